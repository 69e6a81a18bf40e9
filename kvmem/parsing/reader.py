"""AnswerReader: takes an answer apart while it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex

from kvmem.parsing import marks
from kvmem.parsing.calls import CallReader
from kvmem.parsing.parts import InvalidCall, Part, ToolCall
from kvmem.parsing.source import Sink, Source, Step
from kvmem.parsing.tools import ToolIndex


@dataclass(frozen=True)
class ReadAnswer:
    """A whole answer: see `Answer` for the attributes."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    invalid_calls: tuple[InvalidCall, ...]


class AnswerReader:
    """Tells text, thoughts and tool calls apart, whatever pieces the answer comes in.

    A piece of text is passed on as soon as it cannot be the beginning of a call or a thought. Calls in thoughts are
    thoughts. Without a mark, JSON is a call if it stands on a line of its own, or in a code block, and names a tool.

    Args:
        tools: What may be called; None if nothing may, and then everything but thoughts is text.
        opening: The end of the prompt, behind the last message. It may have begun a thought.

    Example:
        ```python
        from kvmem.parsing import AnswerReader

        reader = AnswerReader()
        reader.feed("<think>2 + 2 is 4.</think>Fo")
        reader.feed("ur.")
        print(reader.finish().text)
        ```
    """

    def __init__(self, tools: ToolIndex | None = None, opening: str = "") -> None:
        self._source, self._sink = Source(), Sink(trims=tools is not None)
        self._tools = tools
        self._calls = CallReader(self._source, self._sink, tools or ToolIndex({}))
        self._marks = marks.middle(tools=tools is not None, harmony="<|start|>assistant" in opening)
        self._machine = self._run(open_thought(opening))

    def feed(self, text: str) -> list[Part]:
        """Read the next piece of the answer. Returns the parts that are certain now."""
        self._source.text += text
        next(self._machine, None)
        return self._sink.take()

    def end(self) -> list[Part]:
        """The answer has ended. Returns the last parts."""
        self._source.final = True
        for _ in self._machine:
            pass
        self._sink.finish()
        return self._sink.take()

    def finish(self) -> ReadAnswer:
        """The whole answer."""
        self.end()
        sink = self._sink
        return ReadAnswer(sink.text, sink.reasoning, tuple(sink.calls), tuple(sink.invalid))

    def _run(self, thought: str | None) -> Step:
        if thought is not None:
            yield from self._think(thought)
        yield from self._beginning()
        while True:
            found = yield from self._say_until(self._marks)
            if found is None:
                return
            yield from self._read(found)

    def _beginning(self) -> Step:
        """What may stand at the beginning of an answer only, and behind thoughts."""
        start = self._source.position
        while (found := (yield from self._source.match(marks.BEGINNING))) is not None:
            if found["thought"] is None:
                if self._tools is None or not (yield from self._bare(found.end())):
                    self._source.position = start
                return
            yield from self._think((marks.THOUGHTS | marks.SPECIAL_THOUGHTS)[found["thought"]])
            start = self._source.position

    def _think(self, end: str) -> Step:
        yield from self._pass_on(regex.compile(regex.escape(end)), self._sink.think)

    def _say_until(self, pattern: Any) -> Step:
        return (yield from self._pass_on(pattern, self._say))

    def _say(self, text: str) -> None:
        """Text; at the end of an answer that was cut off, what has begun a mark is none."""
        if self._tools is None or not self._source.final or self._source.position + len(text) < len(self._source.text):
            self._sink.say(text)
            return
        begun = marks.begun_at_end(text, marks.CLOSERS, 1) if self._sink.has_calls else ""
        if not begun and (begun := marks.begun_at_end(text, (*marks.CALLS, *marks.NAMED_CALLS), 3)):
            self._sink.fail(None, begun, "The answer ended in the middle of its first mark.")
        self._sink.say(text[: len(text) - len(begun)])

    def _pass_on(self, pattern: Any, sink: Any) -> Step:
        """Pass on what precedes the next match, as it comes. Returns the match; None if there is none."""
        source = self._source
        while True:
            found = pattern.search(source.text, source.position, partial=not source.final)
            open_ended = found is not None and (found.partial or found.end() == len(source.text)) and not source.final
            certain = len(source.text) if found is None else found.start()
            sink(source.text[source.position : certain])
            source.position = certain
            if found is not None and not open_ended and not found.partial:
                source.position = found.end()
                return found
            if source.final:
                return None
            yield

    def _read(self, found: Any) -> Step:
        """What follows a mark."""
        start, kind = found.start(), found.lastgroup
        if kind == "thought":
            yield from self._think(marks.SPECIAL_THOUGHTS[found["thought"]])
        elif kind in ("harmony", "to"):
            yield from self._harmony(found)
        elif kind == "calls":
            yield from self._calls.marked(start)
            yield from self._closers()
        elif kind == "named":
            if not (yield from self._calls.named(start, found["named"])):
                yield from self._calls.give_up(start, "It is not a call.")
            yield from self._closers()
        elif kind in ("fence", "language"):
            yield from self._fence(found)
        elif kind == "bare" and not (yield from self._bare(found.end())):
            is_mark = any(self._source.text.startswith(mark, found.end()) for mark in marks.BRACKETED)
            self._source.position = found.end() + (not is_mark)
            self._sink.say(self._source.text[start : self._source.position])
        elif kind == "closer" and not self._sink.has_calls:
            self._sink.say(found[0])

    def _closers(self) -> Step:
        while (yield from self._source.match(marks.CLOSER)) is not None:
            pass

    def _bare(self, start: int) -> Step:
        """JSON or Python without a mark. Returns whether it is a call; if not, nothing is read."""
        self._source.position = start
        if (yield from self._calls.values(certain=False)) or (yield from self._calls.pythonic(start, certain=False)):
            return True
        self._source.position = start
        return False

    def _fence(self, found: Any) -> Step:
        """A block of code: calls, or text."""
        source, start = self._source, found.end()
        source.position = start
        is_call = yield from self._fenced(found["language"])
        if is_call:
            yield from source.match(marks.FENCE_END)
        else:
            source.position = start
            self._sink.say(source.text[found.start() : start])

    def _fenced(self, language: str) -> Step:
        if language != "tool_code":
            return (yield from self._calls.values(certain=False))
        start = self._source.position
        code = yield from self._source.until(marks.FENCE_END)
        return code is not None and self._calls.python(code, start)

    def _harmony(self, found: Any) -> Step:
        """A message of gpt-oss: its head, then its text, its thoughts or the arguments of a call."""
        source = self._source
        head = yield from source.until(marks.HARMONY_HEAD)
        if head is None:
            source.position = len(source.text)
            return
        name = found["to"] or next((word[3:] for word in head.split() if word.startswith("to=")), None)
        if name is not None and self._tools is not None:
            yield from self._calls.arguments(found.start(), name.removeprefix("functions."))
            yield from source.match(marks.HARMONY_END)
            return
        is_thought = head.split()[:1] == ["analysis"] or name is not None
        yield from self._pass_on(marks.HARMONY_END, self._sink.think if is_thought else self._sink.say)


def open_thought(opening: str) -> str | None:
    """The end of the thought that a prompt has begun, if it has."""
    for begin, end in (marks.THOUGHTS | marks.SPECIAL_THOUGHTS).items():
        if opening.rfind(begin) > opening.rfind(end):
            return end
    return None
