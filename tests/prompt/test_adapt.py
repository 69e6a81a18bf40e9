from __future__ import annotations

from typing import Any

import pytest
from formats import WEATHER

from kvmem import KVMem, LanguageModel, ModelError
from kvmem.prompt.layout import TemplateOptions, Typesetter
from kvmem.testing import tiny_model

# Reduced forms of the families' templates, with the errors that the real ones raise.
_CALLS = (
    "{% for c in m.tool_calls %}<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}"
)
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
HERMES = _TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + _CALLS + "{% endfor %}"
MISTRAL = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'tool' and m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs!') }}{% endif %}"
    "[TOOL_CALLS][{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}]{% endfor %}"
    "<{{ m.role }}{{ m.tool_call_id }}>{{ m.content }}{% endfor %}"
)
LLAMA = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}<{{ m.role }}>\n"
    "{{ m.content }}{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}{% endfor %}{% endfor %}"
)
KIMI = (
    _TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}<|tool_call_begin|>"
    "{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}{% endfor %}"
)
DEEPSEEK = (
    _TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}"
    "{% endfor %}{% endfor %}"
)
SMOLLM3 = (
    "{% if tools %}{{ tools | tojson }} Write <tool_call>{...}</tool_call>.{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HAMMER = _TOOLS + PLAIN

CALL = "call_0123456789abcdef01234567"


def call(identity: str, city: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def result(identity: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": text}


LOOP = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call(CALL, "Paris")]},
    result(CALL, "Sunny."),
]
BOTH = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [call("a" * 9, "Paris"), call("b" * 9, "Rome")]},
    result("a" * 9, "Sunny."),
    result("b" * 9, "Rainy."),
]


def shown(template: str, messages: list[dict[str, Any]], tools: bool = True) -> str:
    """What the model sees."""
    model = with_template(template)
    options = TemplateOptions((WEATHER,) if tools and model.knows_tools else None)
    layout = Typesetter(model).lay_out(messages, options)
    ids = [token for span in (*layout.before, *layout.after) for token in span.token_ids] + list(layout.query)
    return str(model.tokenizer.decode(ids))


def with_template(template: str) -> LanguageModel:
    model = tiny_model()
    model.tokenizer.chat_template = template
    return model


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        (
            [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}],
            "<user>One.\n\nTwo.",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One."},
                {"role": "assistant", "content": "A."},
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Two."},
            ],
            "<user>Be brief.\n\nOne.<assistant>A.<user>Be kind.\n\nTwo.",
        ),
        (
            [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "One."}],
            "<user><assistant>Hello.<user>One.",
        ),
        (
            LOOP,
            '<user>Weather?<assistant>I look.\n{"name": "weather", "arguments": {"city": "Paris"}}'
            "<user>The result of weather:\nSunny.",
        ),
    ],
)
def test_a_strict_template_sees_every_message(messages: list[dict[str, Any]], wanted: str) -> None:
    """Neighbours are joined, the system message stands in the first turn, and tools become text."""
    assert shown(GEMMA, messages) == wanted


def test_lenient_templates_see_the_messages_as_they_are() -> None:
    """Nothing is adapted that the template accepts."""
    messages = [{"role": "user", "content": "One."}, {"role": "system", "content": "S."}, *LOOP]
    assert shown(HERMES, messages).endswith(
        '<user>One.<system>S.<user>Weather?<assistant>I look.<tool_call>{"name": "weather", "arguments": '
        '{"city": "Paris"}}</tool_call><tool>Sunny.'
    )


def test_ids_are_as_long_as_mistral_wants_them() -> None:
    """A call and its result keep the same one."""
    text = shown(MISTRAL, LOOP)
    identity = text.split('"id": "')[1][:9]
    assert identity.isalnum()
    assert text.endswith(f"<tool{identity}>Sunny.")


def test_calls_that_were_made_together_are_shown_one_after_the_other_if_need_be() -> None:
    """Each with its result, as Llama's template wants it."""
    assert (
        shown(LLAMA, BOTH)
        .split("]", 1)[-1]
        .replace("\n", "")
        .endswith(
            '<user>Weather?<assistant>{"name": "weather", "parameters": {"city": "Paris"}}<tool>Sunny.'
            '<assistant>{"name": "weather", "parameters": {"city": "Rome"}}<tool>Rainy.'
        )
    )
    assert shown(HERMES, BOTH).endswith("</tool_call><tool>Sunny.<tool>Rainy.")


def test_ids_and_arguments_are_what_a_template_makes_calls_of() -> None:
    """Kimi's templates show the id as the name, and DeepSeek's take arguments as text."""
    assert "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{" in shown(KIMI, LOOP)
    assert shown(KIMI, BOTH).count("functions.weather:1") == 1
    assert '<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>' in shown(DEEPSEEK, LOOP)


def test_a_template_that_only_describes_calls_gets_them_as_text() -> None:
    """In the tags that it describes."""
    assert shown(SMOLLM3, LOOP).endswith(
        '<assistant>I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<user>The result of weather:\nSunny."
    )


@pytest.mark.parametrize(
    ("template", "format_"),
    [
        (HERMES, "<tool_call> with JSON (Hermes, Qwen)"),
        (MISTRAL, "[TOOL_CALLS] (Mistral)"),
        (LLAMA, "JSON"),
        (KIMI, "<|tool_call_begin|> (Kimi)"),
        (DEEPSEEK, "<｜tool▁call▁begin｜> (DeepSeek)"),
        (SMOLLM3, "<tool_call> with JSON (Hermes, Qwen)"),
        (PLAIN, "JSON that follows the tools' schemas, because the chat template does not show tools"),
        (
            HAMMER,
            "JSON that follows the tools' schemas, because the chat template shows calls in a format that cannot be "
            "read",
        ),
    ],
)
def test_a_template_tells_its_format(template: str, format_: str) -> None:
    """By a call that it shows, and that is read back."""
    described = with_template(template).template.describe_calls()
    assert described["format"] == format_
    if "read" in described:
        assert described["read"] == 'probe_tool({"city": "Paris"})'


@pytest.mark.parametrize("template", [PLAIN, HAMMER])
def test_a_model_whose_calls_cannot_be_read_makes_calls_by_schema(template: str) -> None:
    """And sees its earlier calls and their results as text."""
    with KVMem(with_template(template)) as mem:
        answer = mem.chat(LOOP, tools=[WEATHER], tool_choice="any", max_tokens=60)
    assert [made.name for made in answer.tool_calls] == ["weather"]
    assert isinstance(answer.tool_calls[0].arguments["city"], str)
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in shown(template, LOOP)


def test_thoughts_are_shown_where_the_template_wants_them() -> None:
    """Special tokens within them stay text."""
    messages = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "A.", "reasoning_content": "Hm, <|im_end|>."},
        {"role": "user", "content": "Two."},
    ]
    assert shown(PLAIN, messages) == "<user>One.<assistant>A.<user>Two."
    thoughtful = "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    assert shown(thoughtful, messages) == "<user>|One.<assistant>Hm, <|im_end|>.|A.<user>|Two."
    model = with_template(thoughtful)
    layout = Typesetter(model).lay_out(messages)
    assert model.tokenizer.eos_token_id not in layout.query


def test_what_no_form_can_show_is_an_error() -> None:
    """It names the first reason."""
    with pytest.raises(ModelError, match="exactly once"):
        shown("{{ messages[-1].content }}", [*LOOP[:1], {"role": "assistant", "content": "A."}, *LOOP[:1]])
