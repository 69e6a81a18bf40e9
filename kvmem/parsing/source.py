"""Source and Sink: what a reader has been given, and what it has found."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from kvmem.parsing.parts import CallPart, InvalidCall, Part, TextPart, ThoughtPart, ToolCall

# A step of a reader: it yields where it needs more of the answer, and returns what it has found.
Step = Generator[None, None, Any]


@dataclass
class Source:
    """The answer as far as it is known. position: up to where it was read. final: whether nothing follows."""

    text: str = ""
    position: int = 0
    final: bool = False

    @property
    def rest(self) -> str:
        return self.text[self.position :]

    def match(self, pattern: Any) -> Step:
        """Match here, and move behind the match; None if there is none. Waits while more text may change that."""
        while True:
            found = pattern.match(self.text, self.position, partial=not self.final)
            if found is None:
                return None
            if not found.partial and (self.final or found.end() < len(self.text)):
                self.position = found.end()
                return found
            yield

    def until(self, pattern: Any) -> Step:
        """The text up to the next match, which is skipped; None if there is no match, and nothing is read then."""
        while True:
            found = pattern.search(self.text, self.position)
            if found is not None:
                before = self.text[self.position : found.start()]
                self.position = found.end()
                return before
            if self.final:
                return None
            yield


@dataclass
class Sink:
    """Collects the parts of an answer, and its text, thoughts and calls as a whole.

    trims: whether white space around calls is left out.
    """

    trims: bool
    parts: list[Part] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidCall] = field(default_factory=list)
    _gap: str = ""
    _begun: int = 0
    _has_thought: bool = False

    def say(self, text: str) -> None:
        """Text. White space at the end waits for what comes next."""
        text = self._gap + text
        if not self.text and (self._has_thought or self._begun):
            text = text.lstrip()
        kept = text.rstrip() if self.trims else text
        self._gap = text[len(kept) :]
        if kept:
            self.text += kept
            self.parts.append(TextPart(kept))

    @property
    def has_calls(self) -> bool:
        return self._begun > 0

    def think(self, text: str) -> None:
        self._has_thought = True
        if not self.reasoning:
            text = text.lstrip()
        if text:
            self.reasoning += text
            self.parts.append(ThoughtPart(text))

    def begin(self, name: str) -> CallPart:
        """The first piece of a call, which identifies it."""
        part = CallPart(self._begun, f"call_{uuid4().hex[:24]}", name, "")
        self._begun += 1
        self.parts.append(part)
        return part

    def extend(self, call: CallPart, arguments: str) -> None:
        if arguments:
            self.parts.append(CallPart(call.index, call.id, None, arguments))

    def end(self, call: CallPart, arguments: dict[str, Any]) -> None:
        self.calls.append(ToolCall(call.id, str(call.name), arguments))

    def fail(self, call: CallPart | None, text: str, error: str) -> None:
        """A call that is not valid. call: its first piece, if that was passed on."""
        name = None if call is None else call.name
        identity = f"call_{uuid4().hex[:24]}" if call is None else call.id
        self.invalid.append(InvalidCall(identity, name, text, error))
        self._begun += call is None

    def finish(self) -> None:
        if self._gap and not self._begun:
            self.text += self._gap
            self.parts.append(TextPart(self._gap))
        self._gap = ""
        self.reasoning = self.reasoning.rstrip()

    def take(self) -> list[Part]:
        """The parts since the last time."""
        taken, self.parts = self.parts, []
        return taken
