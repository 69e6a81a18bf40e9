"""The parts of an answer: text, thoughts and tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A tool call made by the model.

    Attributes:
        id: Unique id of the call.
        name: Name of the tool.
        arguments: The arguments by name, as JSON values.

    Example:
        ```python
        answer = mem.chat(messages, tools=tools, tool_choice="any")
        for call in answer.tool_calls:
            print(call.name, call.arguments)
        ```
    """

    id: str
    name: str
    arguments: Mapping[str, Any]

    def as_openai(self, *, as_text: bool = True) -> dict[str, Any]:
        """The call in OpenAI's format; `as_text`: arguments as JSON text, as OpenAI's API has them, else a mapping."""
        arguments: Any = json.dumps(dict(self.arguments)) if as_text else dict(self.arguments)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class InvalidCall:
    """A call that was begun and is not valid: its arguments are not JSON, or the answer ended in the middle.

    Attributes:
        id: Unique id of the call.
        name: Name of the tool; None if there is none.
        text: What the model wrote, with its markup.
        error: Why it is not valid.
    """

    id: str
    name: str | None
    text: str
    error: str


@dataclass(frozen=True)
class TextPart:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class ThoughtPart:
    """A piece of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class CallPart:
    """A piece of a tool call.

    Attributes:
        index: Number of the call in this answer, from 0.
        id: Id of the call.
        name: Name of the tool, in the first piece of a call; None in the others.
        arguments: The next piece of the arguments as JSON text. The pieces of a call add up to all of it.
    """

    index: int
    id: str
    name: str | None
    arguments: str


Part = TextPart | ThoughtPart | CallPart
