"""GrowingCall: passes on the arguments of a call while they are written."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from kvmem.parsing.json_text import JsonScanner
from kvmem.parsing.parts import CallPart
from kvmem.parsing.source import Sink
from kvmem.parsing.tools import ToolIndex

# Keys of a call, in the words of the families.
NAMES = ("name", "function", "tool_name")
ARGUMENTS = ("arguments", "parameters")


class GrowingCall:
    """A call whose arguments are passed on as they grow."""

    def __init__(self, sink: Sink, tools: ToolIndex) -> None:
        self._sink, self._tools = sink, tools
        self.call: CallPart | None = None
        self._sent = 0
        self._said = ""

    def advance(self, scanner: JsonScanner) -> None:
        """Pass on what has been added, as soon as the name is known."""
        key = next((key for key in ARGUMENTS if (scanner.member(key) or "").strip()[:1] == "{"), None)
        name = next((parsed(scanner.member(key)) for key in NAMES if scanner.has_ended(key)), None)
        if key is None or not isinstance(name, str):
            return
        arguments = (scanner.member(key) or "").lstrip()
        if name == self._tools.answer:
            self._say(arguments)
            return
        self.call = self.call or self._sink.begin(name)
        if not scanner.has_ended(key):
            arguments = arguments.rstrip()
        self._sink.extend(self.call, arguments[self._sent :])
        self._sent = max(self._sent, len(arguments))

    def _say(self, arguments: str) -> None:
        try:
            text = str(from_json(arguments, allow_partial="trailing-strings").get("text", ""))
        except ValueError:
            return
        if len(text) > len(self._said):
            self._sink.say(text[len(self._said) :])
            self._said = text

    def finish(self, name: str, arguments: dict[str, Any]) -> None:
        """The call is complete."""
        if name == self._tools.answer:
            self._say(json.dumps(arguments))
            return
        if self.call is None:
            self.call = self._sink.begin(name)
            self._sink.extend(self.call, json.dumps(arguments))
        self._sink.end(self.call, arguments)


def parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def call_of(value: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments in an object. Raises ValueError."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError("the call is not an object")
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    if name is None:
        raise ValueError("the call has no name")
    arguments: Any = next((value[key] for key in ARGUMENTS if value.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    return name, arguments
