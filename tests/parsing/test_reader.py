from __future__ import annotations

import json
import random
from typing import Any

import pytest
from formats import DOCS, FAMILIES, PARIS, SAID, TOOLS, Family, cases, read, with_table
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem.parsing import AnswerReader, CallPart, ReadAnswer, TextPart, ThoughtPart, ToolCall
from kvmem.parsing.tools import ToolIndex

FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def called(answer: ReadAnswer) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, dict(call.arguments)) for call in answer.tool_calls]


def parts_of(text: str, cuts: list[int], opening: str = "") -> tuple[ReadAnswer, list[Any]]:
    """An answer that comes in pieces, and its parts."""
    reader, parts, start = AnswerReader(TOOLS, opening), [], 0
    for cut in [*sorted(cuts), len(text)]:
        parts += reader.feed(text[start:cut])
        start = cut
    parts += reader.end()
    return reader.finish(), parts


@FAMILY
def test_calls_of_every_family_are_read(family: Family) -> None:
    """One or several, behind text or not, with the types of the schema; thoughts are not executed."""
    found = {name: read(family, text) for name, text in cases(family).items()}
    assert called(found["one call"]) == [("weather", PARIS)]
    assert called(found["several"]) == [("weather", PARIS), ("now", {})]
    assert (found["no call"].text, called(found["no call"])) == (SAID, [])
    assert (found["text before"].text, called(found["text before"])) == (SAID, [("weather", PARIS)])
    assert (found["in thoughts"].text, called(found["in thoughts"])) == (SAID, [])
    assert found["in thoughts"].reasoning.startswith("I could write")
    for name in ("one call", "several"):
        assert (found[name].text, found[name].reasoning, found[name].invalid_calls) == ("", "", ())


@FAMILY
def test_what_is_not_a_call_is_not_executed_and_not_lost(family: Family) -> None:
    """Cut off or not JSON: an invalid call, or text. A tool that does not exist is called if that is certain."""
    found = {name: read(family, text) for name, text in cases(family).items()}
    for name in ("cut off", "not JSON"):
        assert called(found[name]) == []
        kept = found[name].text + "".join(call.text for call in found[name].invalid_calls)
        assert "city" in kept or "Paris" in kept
    assert [call.name for call in found["unknown tool"].tool_calls] == (["dance"] if family.marked else [])
    assert family.marked or "dance" in found["unknown tool"].text


@FAMILY
def test_the_pieces_of_an_answer_do_not_matter(family: Family) -> None:
    """Random cuts, and single characters, give the parts of the whole; no piece of text has any markup of a call."""
    draw = random.Random(0)
    for name, text in cases(family).items():
        whole = read(family, text)
        cuts = [[*range(len(text))], *(draw.sample(range(len(text)), min(len(text), n)) for n in range(1, 25))]
        for some in cuts:
            answer, parts = parts_of(text, some, family.opening)
            assert (answer.text, answer.reasoning, called(answer)) == (whole.text, whole.reasoning, called(whole))
            assert [(c.name, c.text) for c in answer.invalid_calls] == [(c.name, c.text) for c in whole.invalid_calls]
            assert "".join(part.text for part in parts if isinstance(part, TextPart)) == answer.text
            assert "".join(p.text for p in parts if isinstance(p, ThoughtPart)).rstrip() == answer.reasoning
            for call in answer.tool_calls:
                assert json.loads(arguments(parts, call)) == dict(call.arguments)
            if name in ("one call", "several", "text before"):
                assert all(part.text.strip() in SAID for part in parts if isinstance(part, TextPart))


def arguments(parts: list[Any], call: ToolCall) -> str:
    pieces = [part for part in parts if isinstance(part, CallPart) and part.id == call.id]
    assert [piece.name for piece in pieces] == [call.name, *[None] * (len(pieces) - 1)]
    return "".join(piece.arguments for piece in pieces)


WORDS = [
    *("{", "}", "[", "]", '"', "'", "a", ":", ",", "\n", " ", "é", "\\", "```", "weather(", '{"city": "Paris"}'),
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<function=", "[TOOL_CALLS]", "[ARGS]", "<parameter=city>"),
    '{"name": "weather", "arguments": ',
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(WORDS), max_size=14), st.data())
def test_no_answer_breaks_a_reader(words: list[str], data: st.DataObject) -> None:
    """Whatever a model writes, in whatever pieces, the outcome is the same."""
    text = "".join(words)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    (whole, _), (answer, parts) = parts_of(text, []), parts_of(text, cuts)
    assert (answer.text, answer.reasoning, called(answer)) == (whole.text, whole.reasoning, called(whole))
    assert [(c.name, c.text, c.error) for c in answer.invalid_calls] == [
        (c.name, c.text, c.error) for c in whole.invalid_calls
    ]
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == answer.text


def test_arguments_grow() -> None:
    """The name comes first, then the arguments as they are written."""
    reader = AnswerReader(TOOLS)
    pieces = ('<tool_call>{"name": "weather", "argum', 'ents": {"city": "Par', 'is", "days"', ": 2}}", "</tool_call>")
    seen = [[part for part in reader.feed(piece) if isinstance(part, CallPart)] for piece in pieces]
    assert seen[0] == []
    assert [part.name for part in seen[1]] == ["weather", None]
    assert [[part.arguments for part in parts] for parts in seen[1:4]] == [
        ["", '{"city": "Par'],
        ['is", "days"'],
        [": 2}"],
    ]


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    """Brackets and tags that turn out to be text come at once."""
    reader = AnswerReader(TOOLS)
    assert reader.feed("Look: <t") == [TextPart("Look:")]
    assert reader.feed("able> and") == [TextPart(" <table> and")]
    assert reader.feed('\n{"a') == []
    assert "".join(part.text for part in reader.feed('": 1}') if isinstance(part, TextPart)) == '\n{"a": 1}'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]', ["weather", "now"]),
        ('{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}}', ["now", "now"]),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', ["weather"]),
        ('{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}', ["weather"]),
        ('{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', ["weather"]),
        ('{"arguments": {"city": "Paris"}, "name": "weather"}', ["weather"]),
        ("{'name': 'weather', 'arguments': {'city': 'Paris'}}", ["weather"]),
        ('Sure.\n\n```\n{"name": "weather", "arguments": {"city": "Paris"}}\n```\nDone.', ["weather"]),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}', ["weather"]),
        ('<tool_call>{"name": "weather", "arguments": {"city": "a</tool_call>b"}}</tool_call>', ["weather"]),
        ('{{"name": "weather", "arguments": {"city": "Paris"}}}', ["weather"]),
        ('<tool_call>\n{{"name": "now", "arguments": {}}}\n</tool_call>', ["now"]),
        ('<tools>\n{"name": "now", "arguments": {}}\n</tools>', ["now"]),
        ('Write {"name": "now", "arguments": {}} to ask for the time.', []),
        ('{"name": "Paris", "country": "France"}', []),
        ('{"name": "weather", "unit": "C"}', []),
        ('{"name": "weather"}', []),
        ("[1, 2, 3]", []),
        ('{{"name": "Paris"}}', []),
        ("[now] is a link", []),
    ],
)
def test_json_is_a_call_where_it_stands_alone_and_names_a_tool(text: str, wanted: list[str]) -> None:
    """Forms that models are known to write; other JSON, and JSON within a sentence, stays text."""
    answer = read(Family(str, ""), text)  # type: ignore[arg-type]
    assert [call.name for call in answer.tool_calls] == wanted
    assert wanted or answer.text == text


def test_control_characters_in_strings_are_escaped() -> None:
    """Models write line breaks into JSON strings; the arguments are JSON all the same, while they grow."""
    reader = AnswerReader(TOOLS)
    parts = reader.feed('<tool_call>{"name": "weather", "arguments": {"city": "a\nb"}}')
    (call,) = reader.finish().tool_calls
    assert call.arguments == {"city": "a\nb"}
    assert json.loads(arguments(parts, call)) == {"city": "a\nb"}


def test_values_have_the_types_of_the_schema() -> None:
    """XML has no types: a string that looks like a number stays one."""
    properties = {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "list": {"type": "array"},
        "flag": {"type": "boolean"},
        "free": {},
    }
    tools = ToolIndex.of([{"function": {"name": "f", "parameters": {"properties": properties}}}])
    written = {"text": "12", "count": "12", "either": "12", "list": "[1]", "flag": "True", "free": "x y"}
    inner = "".join(f"<parameter={key}>{value}</parameter>" for key, value in written.items())
    reader = AnswerReader(tools)
    reader.feed(f"<function=f>{inner}</function>")
    (call,) = reader.finish().tool_calls
    assert dict(call.arguments) == {
        "text": "12",
        "count": 12,
        "either": "12",
        "list": [1],
        "flag": True,
        "free": "x y",
    }


def test_without_tools_everything_but_thoughts_is_text() -> None:
    """And thoughts are found wherever they begin: in the prompt, or in the answer."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
    for opening, text, thought in (
        ("<|im_start|>assistant\n", f"<think>Hm.</think>{call}", "Hm."),
        ("<|im_start|>assistant\n<think>\n", f"Hm.\n</think>\n\n{call}", "Hm."),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", call, ""),
        ("", call, ""),
    ):
        reader = AnswerReader(None, opening)
        reader.feed(text)
        answer = reader.finish()
        assert (answer.text, answer.reasoning, answer.tool_calls) == (call, thought, ())
    reader = AnswerReader()
    reader.feed("<think>It never ends")
    assert (reader.finish().text, reader.finish().reasoning) == ("", "It never ends")


def test_the_page_on_tools_shows_what_is_read() -> None:
    """Run `python tests/formats.py` to update it."""
    page = DOCS.read_text()
    assert with_table(page) == page
