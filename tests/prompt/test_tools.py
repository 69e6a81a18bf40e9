from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

import kvmem
from kvmem import KVMem
from kvmem.parsing import ReadAnswer
from kvmem.prompt.json_schema import narrow
from kvmem.prompt.tools import Toolbox

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]},
    },
}
CALL = '{"name": "weather", "arguments": {"days": 2}}'
OTHERS = ('{"name": "unknown", "arguments": {}}', "It rains.", '["weather"]', '{"name": "weather", "arguments": 3}')


def read(toolbox: Toolbox, text: str) -> ReadAnswer:
    reader = toolbox.reader("")
    reader.feed(text)
    return reader.finish()


def test_calls_are_read_from_the_forms_models_write() -> None:
    """Bare JSON and <tool_call> tags; other JSON and prose stay text."""
    toolbox = Toolbox((WEATHER,), "auto", native=False)
    answer = read(toolbox, CALL)
    assert (answer.text, [c.arguments for c in answer.tool_calls]) == ("", [{"days": 2}])
    answer = read(toolbox, f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>")
    assert (answer.text, len(answer.tool_calls)) == ("Let me see.", 1)
    for other in OTHERS:
        answer = read(toolbox, other)
        assert (answer.text, answer.tool_calls) == (other, ())
    assert read(toolbox, '{"name": "answer", "arguments": {"text": "Sunny."}}').text == "Sunny."
    assert read(Toolbox((WEATHER,), "none", native=False), CALL).text == CALL


def test_a_model_without_tools_in_its_template_is_told_and_bound() -> None:
    """Its system message lists the functions, `answer` among them unless a call is forced; its answer has a schema."""
    free, forced = (Toolbox((WEATHER,), choice, native=False) for choice in ("auto", "weather"))
    (system, user) = free.instruct([{"role": "user", "content": "Hi"}])
    assert "weather" in system["content"]
    assert '"answer"' in system["content"]
    assert user["content"] == "Hi"
    assert '"answer"' not in forced.instruct([])[0]["content"]
    assert free.schema is not None
    assert len(free.schema["anyOf"]) == 2
    assert forced.schema is not None
    assert forced.schema["properties"]["name"] == {"const": "weather"}
    (told,) = free.instruct([], answer={"enum": ["north"]})
    assert '"answer"' not in told["content"]
    assert told["content"].endswith('write JSON of this schema instead: {"enum": ["north"]}')
    assert "north" not in forced.instruct([], answer={"enum": ["north"]})[0]["content"]
    native = Toolbox((WEATHER,), "auto", native=True)
    assert native.instruct([user]) == [user]
    assert (native.schema, native.for_template) == (None, (WEATHER,))


def test_a_forced_call_and_a_schema_hold_for_random_weights(mem: KVMem) -> None:
    """Whatever the model would like to say."""
    message = [{"role": "user", "content": "Hi"}]
    (call,) = mem.chat(message, tools=[WEATHER], tool_choice="any", max_tokens=80).tool_calls
    assert call.name == "weather"
    assert call.arguments["days"] in (1, 2)
    answer = mem.chat(message, schema={"enum": ["north", "south"]}, max_tokens=20)
    assert answer.text in ('"north"', '"south"')
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [WEATHER], "tool_choice": "wether"},
        {"tools": ["weather"]},
        {"schema": "string"},
        {"schema": {"type": "nonsense"}},
    ],
)
def test_tools_and_schemas_that_are_none_are_an_error(mem: KVMem, options: dict[str, Any]) -> None:
    """Each says what to give instead, and the engine goes on."""
    with pytest.raises(kvmem.InputError, match=r"Give|Known"):
        mem.chat([{"role": "user", "content": "Hi"}], max_tokens=4, **options)
    assert mem.chat([{"role": "user", "content": "Hi"}], max_tokens=1).usage.generated == 1


def test_a_narrowed_schema_stays_satisfiable_and_keeps_its_data() -> None:
    """Bounds respect what the schema asks for, data is not rewritten, and combined objects stay open."""
    schema = {
        "type": "object",
        "properties": {
            "long": {"type": "string", "minLength": 200},
            "free": {"type": "string"},
            "count": {"type": "integer"},
            "fixed": {"const": {"type": "string"}},
            "both": {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        },
    }
    narrowed = narrow(schema, 100)
    found = narrowed["properties"]
    assert narrowed["additionalProperties"] is False
    assert found["long"]["maxLength"] >= 200
    assert found["free"]["maxLength"] == 50
    assert found["count"]["maximum"] == 2**53
    listed = narrow({"type": "array", "items": {"type": "string"}, "maxItems": 5}, 100)
    assert listed["items"]["maxLength"] == 20
    assert found["fixed"] == schema["properties"]["fixed"]  # type: ignore[index]
    assert found["both"] == schema["properties"]["both"]  # type: ignore[index]


NAMED = {"type": "object", "properties": {"name": {"enum": ["Ada"]}}, "required": ["name"]}
AGED = {"properties": {"age": {"enum": [36]}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$defs": {"N": NAMED}, "allOf": [{"$ref": "#/$defs/N"}, AGED]}, {"name": "Ada", "age": 36}),
        ({**NAMED, "anyOf": [AGED]}, {"name": "Ada", "age": 36}),
        ({**NAMED, "$defs": {"~a/": AGED}, "$ref": "#/$defs/~0a~1"}, {"name": "Ada", "age": 36}),
        (
            {"allOf": [{"properties": {"who": NAMED}}, {"properties": {"who": AGED}}], "required": ["who"]},
            {"who": {"name": "Ada", "age": 36}},
        ),
        ({"type": "object", "properties": {"not": NAMED}, "required": ["not"]}, {"not": {"name": "Ada"}}),
        ({**NAMED, "required": ["name", "age"]}, {"name": "Ada", "age": 36}),
        ({"properties": {"n": {"type": "integer", "minimum": 10**17}}, "required": ["n"]}, {"n": 10**17}),
    ],
)
def test_a_narrowed_schema_allows_what_several_of_its_parts_ask_for(
    mem: KVMem, schema: dict[str, Any], value: dict[str, Any]
) -> None:
    """Parts that apply to the same object do not forbid each other's properties, and answers can be given."""
    jsonschema.validate(value, narrow(schema, 100))
    answer = mem.chat([{"role": "user", "content": "Hi"}], schema=schema, max_tokens=80)
    jsonschema.validate(json.loads(answer.text), schema)


def test_what_stands_alone_is_closed_through_references_too() -> None:
    """A definition that is all that is said of an object gets no more properties; under "not" nothing changes."""
    alone = {"$defs": {"N": NAMED}, "items": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}, "not": NAMED}
    found = narrow(alone, 100)
    assert found["$defs"]["N"]["additionalProperties"] is False
    assert found["not"] == NAMED
    both = {**alone, "prefixItems": [{"allOf": [{"$ref": "#/$defs/N"}, AGED]}]}
    assert narrow(both, 100)["$defs"]["N"] == NAMED


def test_a_forced_call_needs_tools(mem: KVMem) -> None:
    """tool_choice without tools is an error, and a schema of None does not undo it."""
    message = [{"role": "user", "content": "Hi"}]
    with pytest.raises(kvmem.InputError, match="needs tools"):
        mem.chat(message, tool_choice="any")
    assert mem.chat(message, tools=[WEATHER], tool_choice="any", schema=None, max_tokens=80).tool_calls


def test_what_is_no_call_keeps_to_the_schema_that_was_asked_for(mem: KVMem) -> None:
    """A call stays possible, a forced one is one, and definitions stay where references find them."""
    where = {"properties": {"to": {"$ref": "#/$defs/To"}}, "required": ["to"], "type": "object"}
    answer = {**where, "$defs": {"To": {"enum": ["north", "south"]}}}
    forced, free, none = (Toolbox((WEATHER,), choice, native=True) for choice in ("any", "auto", "none"))
    assert forced.schema_with(answer) == forced.schema
    assert none.schema_with(answer) == answer
    assert free.schema_with(None) is None
    to = {"$ref": "#/$defs/answer/$defs/To"}
    moved = {**where, "properties": {"to": to}, "$defs": answer["$defs"]}
    assert free.schema_with(answer) == {
        "anyOf": [forced.schema, {"$ref": "#/$defs/answer"}],
        "$defs": {"answer": moved},
    }
    plain = {"enum": ["north", "south"]}
    assert free.schema_with(plain) == {"anyOf": [forced.schema, plain]}

    message = [{"role": "user", "content": "Hi"}]
    options: dict[str, Any] = {"tools": [WEATHER], "schema": answer, "max_tokens": 80}
    assert mem.chat(message, tool_choice="weather", **options).tool_calls
    assert json.loads(mem.chat(message, tool_choice="none", **options).text)["to"] in ("north", "south")
    found = mem.chat(message, **options)
    assert found.tool_calls or json.loads(found.text)["to"] in ("north", "south")
    with pytest.raises(kvmem.InputError, match="schema"):
        mem.chat(message, tools=[WEATHER], schema="string")


NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 1, "maxItems": 2}},
    "required": ["items"],
}


def test_tools_may_define_what_they_refer_to(mem: KVMem) -> None:
    """Each its own, by the same name; arguments keep to it, of an object that refers to itself too."""
    items = ({"enum": ["tea", "milk"]}, {"enum": [1, 2]})
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {**NESTED, "$defs": {"Item": item}}}}
        for name, item in zip(("order", "count"), items, strict=True)
    ]
    tree = {"type": "object", "properties": {"name": {"enum": ["a"]}, "child": {"$ref": "#"}}, "required": ["name"]}
    tools.append({"type": "function", "function": {"name": "grow", "parameters": tree}})
    for tool in tools:
        function = tool["function"]
        (call,) = mem.chat(
            [{"role": "user", "content": "Hi"}], tools=tools, tool_choice=function["name"], max_tokens=120
        ).tool_calls
        jsonschema.validate(dict(call.arguments), function["parameters"])
    free = mem.chat([{"role": "user", "content": "Hi"}], tools=tools, schema=tree, max_tokens=120)
    assert free.tool_calls or jsonschema.validate(json.loads(free.text), tree) is None
