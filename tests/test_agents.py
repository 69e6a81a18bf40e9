"""Tool calls and thoughts, from the engine's side."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from formats import NOW, WEATHER
from helpers import agent_model, open_mem, prompts, says

from kvmem import CallPart, InputError, KVMem, TextPart, ThoughtPart
from kvmem.prompt.layout import REASONING

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
ANSWER = f"I look it up.\n{CALL}"


def test_text_and_calls_stream_with_tools_bound() -> None:
    """The text comes piece by piece, without markup, then the name, then the arguments as they grow."""
    with KVMem(says(agent_model(), ANSWER, ANSWER)) as mem:
        stream = mem.stream_chat(ASK, tools=TOOLS, max_tokens=120)
        parts = list(stream.parts)
        plain = list(mem.stream_chat(ASK, tools=TOOLS, max_tokens=120))
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    calls = [part for part in parts if isinstance(part, CallPart)]
    assert (texts, "".join(plain)) == (plain, "I look it up.")
    assert len(texts) > 5
    assert [part.name for part in calls] == ["weather", *[None] * (len(calls) - 1)]
    assert len(calls) > 5
    assert json.loads("".join(part.arguments for part in calls)) == {"city": "Paris", "days": 2}
    (call,) = stream.answer.tool_calls
    assert (call.id, call.name, stream.answer.text) == (calls[0].id, "weather", "I look it up.")


def test_parts_can_be_awaited() -> None:
    """The same ones, in an event loop."""

    async def main(mem: KVMem) -> list[Any]:
        return [part async for part in mem.stream_chat(ASK, tools=TOOLS, max_tokens=120).parts]

    with KVMem(says(agent_model(), ANSWER)) as mem:
        parts = asyncio.run(main(mem))
    assert {type(part) for part in parts} == {TextPart, CallPart}


def test_thoughts_are_kept_apart_everywhere(tmp_path: Path) -> None:
    """In questions, conversations and batches; a call in them is not made, and a thread keeps them beside the text."""
    answer = f"<think>\nI could write {CALL}.\n</think>\n\nIt is sunny."
    model = says(agent_model(), *[answer] * 5)
    with open_mem(model, tmp_path / "kv", max_tokens=200) as mem:
        mem.add("The weather in Paris is sunny.")
        asked = mem.ask("What is the weather?")
        chatted = mem.chat(ASK, tools=TOOLS, thread="t")
        (one,) = mem.batch(["What is the weather?"])
        parts = list(mem.stream("What is the weather?").parts)
        for found in (asked, chatted, one):
            assert (found.text, found.tool_calls) == ("It is sunny.", ())
            assert found.reasoning == f"I could write {CALL}."
        assert "".join(part.text for part in parts if isinstance(part, TextPart)) == "It is sunny."
        assert "".join(part.text for part in parts if isinstance(part, ThoughtPart)).strip() == asked.reasoning
        assert mem.history("t")[-1] == {"role": "assistant", "content": "It is sunny.", REASONING: asked.reasoning}
        assert mem.complete("Once", max_tokens=3).reasoning == ""


def test_thoughts_that_the_prompt_begins_are_thoughts() -> None:
    """Templates that write the first tag leave only the last one to the model."""
    with KVMem(says(agent_model(), "Hm.\n</think>\nYes.", "Yes.")) as mem:
        thinking = mem.chat(ASK, chat_template_kwargs={"enable_thinking": True}, max_tokens=40)
        plain = mem.chat(ASK, max_tokens=40)
    assert (thinking.text, thinking.reasoning) == ("Yes.", "Hm.")
    assert (plain.text, plain.reasoning) == ("Yes.", "")


def test_variables_of_the_template_are_given_at_init_and_per_call() -> None:
    """Those of a call win; all that make a prompt take them, and what kvmem sets itself is an error."""
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    with prompts() as seen, KVMem(agent_model(), chat_template_kwargs=on, max_tokens=2) as mem:
        mem.chat(ASK)
        mem.chat(ASK, chat_template_kwargs=off)
        mem.ask("What?", context=["Nothing."])
        mem.ask("What?", context=["Nothing."], chat_template_kwargs=off)
        prompt = mem.build_prompt(ASK, chat_template_kwargs=off)
        assert mem.model.tokenizer.decode(prompt.prompt.token_ids).endswith("assistant\n")
        for wrong in ({"tools": []}, "enable_thinking"):
            with pytest.raises(InputError, match="chat_template_kwargs"):
                mem.chat(ASK, chat_template_kwargs=wrong)  # type: ignore[arg-type]
    assert [text.endswith("<think>\n") for text in seen] == [True, False, True, False]


@pytest.mark.parametrize("left", [*range(18, len(ANSWER), 9), len(ANSWER) - 4])
def test_a_call_that_is_cut_off_is_not_made(left: int) -> None:
    """Wherever it is cut, and no part of its markup is text."""
    with KVMem(says(agent_model(), ANSWER)) as mem:
        answer = mem.chat(ASK, tools=TOOLS, max_tokens=left)
    complete = left >= len(ANSWER) - len("\n</tool_call>")
    assert bool(answer.tool_calls) == complete
    assert complete or answer.invalid_calls
    assert answer.text == "I look it up."


def test_constrained_answers_begin_behind_the_thoughts() -> None:
    """The schema holds for the answer; endless thoughts end in time for it."""
    schema = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    on = {"enable_thinking": True}
    with KVMem(says(agent_model(), "Two or one?\n</think>", "Hm. " * 50, end=False)) as mem:
        mem.model.tokenizer.add_tokens(["</think>"])
        answer = mem.chat(ASK, schema=schema, chat_template_kwargs=on, max_tokens=80)
    assert answer.reasoning == "Two or one?"
    assert json.loads(answer.text)["days"] in (1, 2)


def test_special_tokens_that_mark_calls_are_seen() -> None:
    """They are not a part of decoded text, but of what is read; other special tokens are in neither."""
    model = agent_model()
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|im_start|>"]})
    model.hf.resize_token_embeddings(320)
    said = '<|im_start|>[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    with KVMem(says(model, said, said)) as mem:
        answer = mem.chat(ASK, tools=TOOLS, max_tokens=80)
        raw = mem.complete("Once", max_tokens=80)
    assert [call.name for call in answer.tool_calls] == ["now"]
    assert answer.text == ""
    assert raw.text == '[{"name": "now", "arguments": {}}]'


def test_a_loop_of_calls_goes_on_from_its_messages() -> None:
    """A call and its result go back into the conversation, and the model sees both."""
    with prompts() as seen, KVMem(says(agent_model(), ANSWER, "It is sunny.")) as mem:
        first = mem.chat(ASK, tools=TOOLS, max_tokens=120)
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny."}
        second = mem.chat([*ASK, first.message, result], tools=TOOLS, max_tokens=40)
    assert second.text == "It is sunny."
    assert CALL in seen[1]
    assert "<|im_start|>tool\nSunny.<|im_end|>" in seen[1]
