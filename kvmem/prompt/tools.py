"""Tool calls: how tools are described to a model, and how its calls are parsed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmem.errors import InputError
from kvmem.parsing import AnswerReader
from kvmem.parsing.parts import ToolCall
from kvmem.parsing.tools import ToolIndex
from kvmem.prompt.json_schema import DATA
from kvmem.prompt.layout import Message, as_pieces

Tool = Mapping[str, Any]
__all__ = ["ANSWER", "Tool", "ToolCall", "Toolbox"]
# The tool that a model calls to answer, if its chat template does not support tools.
ANSWER: Tool = {
    "type": "function",
    "function": {
        "name": "answer",
        "description": "Answer the user.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}


@dataclass(frozen=True)
class Toolbox:
    """The tools of one answer, and how the model must use them. Raises InputError.

    Attributes:
        tools: Functions with JSON schemas, in the format of OpenAI's API.
        choice: "auto", "any" (or "required"), "none", or the name of a tool.
        native: Whether the model's chat template supports tools, in a format whose calls can be read.
    """

    tools: tuple[Tool, ...]
    choice: str
    native: bool

    def __post_init__(self) -> None:
        for tool in self.tools:
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise InputError(f'{tool!r} is not a tool. Give {{"type": "function", "function": {{"name": ...}}}}.')
        if self.choice not in ("auto", "any", "required", "none", *self._names):
            known = ", ".join(self._names)
            raise InputError(
                f"tool_choice={self.choice!r} is not one of the tools. Known are: {known}. "
                "'auto', 'any', 'required' and 'none' are allowed as well."
            )

    @property
    def _names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def for_template(self) -> tuple[Tool, ...] | None:
        return self.tools if self.native and self.choice != "none" else None

    @property
    def _offered(self) -> tuple[Tool, ...]:
        """The tools a model without native tools may call. It can only make calls, so answering is a tool as well."""
        return (*self.tools, ANSWER) if self.choice == "auto" else self.tools

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, or None if it is unconstrained."""
        if self.choice == "none" or (self.choice == "auto" and self.native):
            return None
        functions = [tool["function"] for tool in self._offered]
        if self.choice not in ("auto", "any", "required"):
            functions = [function for function in functions if function["name"] == self.choice]
        return _any_of(functions)

    def schema_with(self, answer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Like `schema`, but an answer that is not a call must follow the schema `answer`."""
        if answer is None or self.choice not in ("auto", "none"):
            return self.schema
        if self.choice == "none" or not isinstance(answer, Mapping):
            return answer
        return _any_of([tool["function"] for tool in self.tools], answer)

    def instruct(self, messages: Sequence[Message], answer: Mapping[str, Any] | None = None) -> list[Message]:
        """`messages`, with the tools described in the system message if the chat template does not support tools.

        answer: the schema of an answer that is not a call, as in `schema_with`.
        """
        if self.native or self.choice == "none":
            return list(messages)
        either = answer is not None and self.choice == "auto"
        functions = "\n".join(json.dumps(tool["function"]) for tool in (self.tools if either else self._offered))
        text = (
            "You work by calling one of these functions:\n"
            f"{functions}\n"
            'Write nothing but JSON: {"name": "<function>", "arguments": {...}}'
        )
        if either:
            text += f"\nWhen you know the answer, write JSON of this schema instead: {json.dumps(answer, default=str)}"
        if messages and messages[0].get("role") == "system":
            content = [*as_pieces(messages[0].get("content")), f"\n\n{text}"]
            return [{**messages[0], "content": content}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def reader(self, opening: str) -> AnswerReader:
        """Reads the answer to a prompt that ends in `opening`."""
        if self.choice == "none":
            return AnswerReader(None, opening)
        name = ANSWER["function"]["name"]
        answers = not self.native and self.choice == "auto" and name not in self._names
        tools = ToolIndex.of(self.tools if self.native else self._offered, name if answers else None)
        return AnswerReader(tools, opening)


def _any_of(functions: Sequence[Mapping[str, Any]], answer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of a call to one of `functions`, or of an answer."""
    defined: dict[str, Any] = {}
    schemas = []
    for number, function in enumerate(functions):
        arguments = _standalone(function.get("parameters") or {"type": "object"}, f"arguments{number}", defined)
        schemas.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    if answer is not None:
        schemas.append(_standalone(answer, "answer", defined))
    whole = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {**whole, "$defs": defined} if defined else whole


def _standalone(schema: Any, name: str, defined: dict[str, Any]) -> Any:
    """`schema` for use inside another one. References are relative to the root, so with any it becomes a definition."""
    moved = _moved(schema, f"#/$defs/{name}")
    if moved == schema:
        return schema
    defined[name] = moved
    return {"$ref": f"#/$defs/{name}"}


def _moved(node: Any, root: str) -> Any:
    """`node` with its references made relative to `root`."""
    if isinstance(node, list):
        return [_moved(item, root) for item in node]
    if not isinstance(node, Mapping):
        return node
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if key in DATA
        else _moved(value, root)
        for key, value in node.items()
    }
