"""JsonScanner: follows a JSON value while it is written, and corrects what models often get wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

_WORDS = {"True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}


@dataclass
class Member:
    """Where the value of a key is in the scanner's output. end: -1 until it has ended."""

    start: int
    end: int = -1


@dataclass
class JsonScanner:
    """Reads an object or an array, character by character, up to its end.

    `output` is what was read, as JSON: control characters in strings are escaped, strings in single quotes get double
    ones, and the words of Python (`True`, `None`) become JSON's. What is neither stays, and is not valid JSON.

    Attributes:
        output: See above. It only grows.
        members: The members of the outermost object that have begun.
        done: Whether the value has ended.
        broken: Whether it cannot be JSON, because brackets do not match or it does not begin with one.
    """

    output: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    done: bool = False
    broken: bool = False
    _stack: list[str] = field(default_factory=list)
    _quote: str = ""
    _escaped: bool = False
    _word: str = ""
    _string_start: int = -1
    _last_string: str | None = None
    _key: str | None = None

    def feed(self, text: str) -> int:
        """Read `text` up to the end of the value. Returns the number of characters that were read."""
        for number, character in enumerate(text):
            if self.done or self.broken:
                return number
            if self._quote:
                self._inside(character)
            else:
                self._outside(character)
        return len(text)

    @property
    def closing(self) -> str:
        """What makes the output unparsable for a parser that completes JSON: the wrong bracket, outside of strings."""
        return ('"' if self._quote else "") + ("]" if self._stack and self._stack[-1] == "{" else "}")

    def member(self, key: str) -> str | None:
        """The output of the value of `key`, as far as it has been read; None if it has not begun."""
        member = self.members.get(key)
        if member is None or not self.output[member.start :].strip():
            return None
        return self.output[member.start : member.end if member.end >= 0 else None]

    def has_ended(self, key: str) -> bool:
        return key in self.members and self.members[key].end >= 0

    def _inside(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
            # JSON has no escaped single quote.
            self.output += "'" if character == "'" else f"\\{character}"
        elif character == "\\":
            self._escaped = True
        elif character == self._quote:
            self._quote = ""
            self.output += '"'
            self._last_string = self.output[self._string_start :]
        elif character == '"' or character < " ":
            self.output += json.dumps(character)[1:-1]
        else:
            self.output += character

    def _outside(self, character: str) -> None:
        if character.isalpha():
            self._word += character
            return
        self.output += _WORDS.get(self._word, self._word)
        self._word = ""
        if character in "\"'":
            self._quote, self._string_start = character, len(self.output)
            self.output += '"'
        elif character in "{[":
            self._stack.append(character)
            self.output += character
        elif character in "}]":
            self._close(character)
        else:
            self._separate(character)
        self.broken = self.broken or not (self._stack or self.done or character.isspace())

    def _close(self, character: str) -> None:
        if not self._stack or _CLOSING[self._stack.pop()] != character:
            self.broken = True
            return
        if not self._stack:
            self._end_member()
            self.done = True
        self.output += character

    def _separate(self, character: str) -> None:
        outermost = self._stack == ["{"]
        if outermost and character == ",":
            self._end_member()
        self.output += character
        if outermost and character == ":" and self._key is None and self._last_string is not None:
            self._key = _unquoted(self._last_string)
            self.members[self._key] = Member(len(self.output))

    def _end_member(self) -> None:
        if self._key is not None:
            self.members[self._key].end = len(self.output)
        self._key = None


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text
