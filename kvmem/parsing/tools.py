"""ToolIndex: the tools that an answer may call, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ToolIndex:
    """Tools by name, with the JSON schemas of their arguments.

    answer: the name of the tool by which a model answers that can only make calls; its argument `text` is the answer.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    answer: str | None = None

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]], answer: str | None = None) -> ToolIndex:
        functions = [tool["function"] for tool in tools]
        return cls({function["name"]: function.get("parameters") or {} for function in functions}, answer)

    def knows(self, name: Any) -> bool:
        return isinstance(name, str) and name in self.schemas

    def needs_arguments(self, name: str) -> bool:
        return bool(self.schemas[name].get("required"))

    def properties(self, name: str) -> Mapping[str, Any]:
        found = self.schemas.get(name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}

    def value(self, name: str, key: str, text: str) -> Any:
        """A value that was written as plain text, in the type that the schema of the tool gives it."""
        types = _types(self.properties(name).get(key))
        if types <= {"string"} and types:
            return text
        if text.strip() in _WORDS:
            return _WORDS[text.strip()]
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return text if isinstance(value, str) or ("string" in types and not isinstance(value, dict | list)) else value


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    types = {declared} if isinstance(declared, str) else set(declared or ())
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            types |= _types(choice)
    if not types and all(isinstance(value, str) for value in schema.get("enum") or (0,)):
        types = {"string"}
    return types
