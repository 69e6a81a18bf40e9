"""CallReader: reads tool calls in all their formats, while they are written."""

from __future__ import annotations

import ast
import json
from typing import Any

from transformers.utils.chat_parsing.content_parsers import parse_content

from kvmem.parsing import marks
from kvmem.parsing.growing import ARGUMENTS, NAMES, GrowingCall, call_of, parsed
from kvmem.parsing.json_text import JsonScanner
from kvmem.parsing.parts import CallPart
from kvmem.parsing.python_calls import call_nodes
from kvmem.parsing.source import Sink, Source, Step
from kvmem.parsing.tools import ToolIndex

_KEYS = {*NAMES, *ARGUMENTS, "type", "id", "tool_call_id", "index"}
_LONGEST_NAME = 256


class CallReader:
    """Reads calls from a source into a sink.

    Its methods are steps: generators that yield where they need more of the answer.
    """

    def __init__(self, source: Source, sink: Sink, tools: ToolIndex) -> None:
        self._source, self._sink, self._tools = source, sink, tools

    def marked(self, start: int) -> Step:
        """What follows a mark that announces calls. start: where the mark begins."""
        yield from self._source.match(marks.SPACE)
        begins = self._source.rest[:1]
        if begins == "{" or (begins == "[" and (yield from self._pythonic_name()) is None):
            found = yield from self.values(certain=True, mark=start)
        elif begins == "[":
            found = yield from self.pythonic(start, certain=True)
        elif begins == "<":
            found = True  # another mark follows
        elif begins == "`":
            found = yield from self._fenced_python(start)
        else:
            found = yield from self.named(start, "")
        if not found:
            yield from self.give_up(start, "It is not a call.")

    def named(self, start: int, mark: str) -> Step:
        """A name and its arguments, as JSON or XML. Returns whether it is that."""
        head = yield from self._head()
        name = next((m["name"].strip() for pattern in marks.HEADS if (m := pattern.fullmatch(head or ""))), None)
        if name is None:
            return False
        name = name.removeprefix("functions.")
        if mark in marks.UNQUOTED:
            yield from self._unquoted(start, name, marks.UNQUOTED[mark])
        elif self._source.rest[:1] == "{":
            yield from self.arguments(start, name)
        else:
            yield from self._xml(start, name)
        return True

    def _head(self) -> Step:
        """The text up to the arguments, which is not read if there are none."""
        start = self._source.position
        while True:
            found = marks.HEAD_END.search(self._source.text, start)
            if found is not None or self._source.final or len(self._source.text) - start > _LONGEST_NAME:
                break
            yield
        if found is None or found.start() - start > _LONGEST_NAME:
            return None
        self._source.position = found.start()
        return self._source.text[start : found.start()]

    # JSON

    def values(self, *, certain: bool, mark: int | None = None) -> Step:
        """Calls as JSON objects, one or several, or an array of them. Returns whether there is one.

        certain: whether markup announces the calls. Without it, anything but a call to a known tool is left unread.
        mark: where that markup begins.
        """
        source, begin, found = self._source, self._source.position, 0
        yield from source.match(marks.SPACE)
        is_array = source.rest[:1] == "["
        source.position += is_array
        while True:
            before = source.position
            yield from source.match(marks.BETWEEN)
            begins = source.position if mark is None or found else mark
            # Qwen2.5's template shows calls in double braces, and its models write them.
            doubled = (yield from source.match(marks.DOUBLED)) is not None
            if source.rest[:1] == "{" and (yield from self._object(certain, begins)):
                found += 1
                if doubled:
                    yield from source.match(marks.BRACE)
                continue
            if is_array and found and source.rest[:1] == "]":
                source.position += 1
            else:
                source.position = before if found else begin
            return found > 0

    def _object(self, certain: bool, begins: int) -> Step:
        """One call as an object. Returns whether it is one, or a broken one. begins: where it does, with its mark."""
        source, start, scanner = self._source, self._source.position, JsonScanner()
        growing = GrowingCall(self._sink, self._tools)
        sure: bool | None = certain or None
        while True:
            source.position += scanner.feed(source.rest)
            sure = sure or self._verdict(scanner)
            if sure is False:
                source.position = start
                return False
            if sure:
                growing.advance(scanner)
            if scanner.done or scanner.broken or source.final:
                break
            yield
        if sure is None:
            source.position = start
            return False
        if scanner.broken and certain:
            yield from self.give_up(begins, "It is not JSON: brackets do not match.", growing.call)
        else:
            self._close(scanner, growing, begins)
        return True

    def _close(self, scanner: JsonScanner, growing: GrowingCall, start: int) -> None:
        written = self._source.text[start : self._source.position]
        try:
            name, arguments = call_of(json.loads(scanner.output))
        except ValueError as error:
            reason = (
                f"The answer ended in the middle of it: {error}" if not scanner.done else f"It is not JSON: {error}"
            )
            self._sink.fail(growing.call, written, reason)
            return
        growing.finish(name, arguments)

    def _verdict(self, scanner: JsonScanner) -> bool | None:
        """Whether an object is a call of a known tool; None if that is not known yet.

        The order of its members decides, not how much of it is there, so that pieces of any size give the same.
        """
        named = begun = False
        for key in scanner.members:
            if key not in _KEYS:
                return False
            if key in NAMES:
                value = parsed(scanner.member(key)) if scanner.has_ended(key) else None
                if scanner.has_ended(key) and not (self._tools.knows(value) or isinstance(value, dict)):
                    return False
                named = named or isinstance(value, str)
            begun = begun or (key in ARGUMENTS and (scanner.member(key) or "").strip()[:1] in ("{", '"'))
            if named and begun:
                return True
        if not scanner.done:
            return False if scanner.broken else None
        try:
            name, arguments = call_of(json.loads(scanner.output))
        except ValueError:
            return False
        return self._tools.knows(name) and (bool(arguments) or not self._tools.needs_arguments(name))

    def arguments(self, start: int, name: str) -> Step:
        """The arguments of a call whose name is known, as a JSON object."""
        source, scanner = self._source, JsonScanner()
        call, sent = self._sink.begin(name), 0
        while True:
            source.position += scanner.feed(source.rest)
            self._sink.extend(call, scanner.output[sent:])
            sent = len(scanner.output)
            if scanner.done or scanner.broken or source.final:
                break
            yield
        if scanner.broken:
            yield from self.give_up(start, "It is not JSON: brackets do not match.", call)
            return
        self._end(call, start, scanner.output)
        yield from source.match(marks.BACKTICKS)

    def _end(self, call: CallPart, start: int, arguments: str) -> None:
        try:
            value = json.loads(arguments)
            if not isinstance(value, dict):
                raise ValueError("the arguments are not an object")
        except ValueError as error:
            self._sink.fail(call, self._source.text[start : self._source.position], f"It is not JSON: {error}")
            return
        self._sink.end(call, value)

    def _unquoted(self, start: int, name: str, end: Any) -> Step:
        """Gemma's arguments: keys without quotes, and strings between special marks."""
        body = yield from self._source.until(end)
        if body is None:
            yield from self.give_up(start, "The answer ended in the middle of it.", self._sink.begin(name))
            return
        strings = [['<|"|>', '<|"|>'], ["<escape>", "<escape>"]]
        call = self._sink.begin(name)
        try:
            value = parse_content(body, "json", {"unquoted_keys": True, "string_delims": strings})
        except ValueError as error:
            self._sink.fail(call, self._source.text[start : self._source.position], f"It is not a call: {error}")
            return
        self._sink.extend(call, json.dumps(value))
        self._sink.end(call, value)

    # XML and Python

    def _xml(self, start: int, name: str) -> Step:
        """Arguments as elements, whose text has the type that the tool's schema gives it."""
        source, values, call = self._source, {}, self._sink.begin(name)
        while (found := (yield from source.match(marks.PARAMETER))) is not None:
            text = yield from source.until(marks.PARAMETER_END)
            if text is None:
                break
            key = found["key"]
            values[key] = self._tools.value(name, key, text.removeprefix("\n").removesuffix("\n"))
            piece = json.dumps({key: values[key]})[:-1]
            self._sink.extend(call, piece if len(values) == 1 else f", {piece[1:]}")
        if (yield from source.match(marks.XML_END)) is None:
            yield from self.give_up(start, "Its end is missing.", call)
            return
        self._sink.extend(call, "}" if values else "{}")
        self._sink.end(call, values)

    def _pythonic_name(self) -> Step:
        start = self._source.position
        found = yield from self._source.match(marks.PYTHONIC)
        self._source.position = start
        return None if found is None else found["name"]

    def pythonic(self, start: int, *, certain: bool) -> Step:
        """A list of calls in Python. Returns whether it is that."""
        source, begin = self._source, self._source.position
        name = yield from self._pythonic_name()
        if name is None or not (certain or self._tools.knows(name)):
            return False
        scanner = JsonScanner()
        while True:
            source.position += scanner.feed(source.rest)
            if scanner.done or scanner.broken or source.final:
                break
            yield
        return self.python(source.text[begin : source.position], start, certain=certain)

    def _fenced_python(self, start: int) -> Step:
        if (yield from self._source.match(marks.PYTHON_FENCE)) is None:
            return False
        code = yield from self._source.until(marks.BACKTICKS)
        return code is not None and self.python(code, start, certain=True)

    def python(self, code: str, start: int, *, certain: bool = False) -> bool:
        """Calls in Python, one or a list of them. Returns whether it is that; if `certain`, what is not is invalid."""
        try:
            calls = [self._python_call(node) for node in call_nodes(code)]
        except (ValueError, SyntaxError) as error:
            if certain:
                self._sink.fail(None, self._source.text[start : self._source.position], f"It is not a call: {error}")
            return certain
        if not calls or not (certain or all(self._tools.knows(name) for name, _ in calls)):
            return False
        for name, arguments in calls:
            call = self._sink.begin(name)
            self._sink.extend(call, json.dumps(arguments))
            self._sink.end(call, arguments)
        return True

    def _python_call(self, node: ast.Call) -> tuple[str, dict[str, Any]]:
        name = ast.unparse(node.func)
        arguments = dict(zip(self._tools.properties(name), map(ast.literal_eval, node.args), strict=False))
        return name, arguments | {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}

    def give_up(self, start: int, error: str, call: CallPart | None = None) -> Step:
        """All that follows belongs to a call that cannot be read, up to a mark that closes it."""
        source = self._source
        while (found := marks.CLOSER.search(source.text, source.position)) is None and not source.final:
            yield
        source.position = len(source.text) if found is None else found.start()
        self._sink.fail(call, source.text[start : source.position if found is None else found.end()], error)
