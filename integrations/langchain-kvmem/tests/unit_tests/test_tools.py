from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from formats import NOW, WEATHER
from helpers import agent_model, prompts, says
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver

from kvmem import KVMem
from kvmem.testing import tiny_model
from langchain_kvmem import CachedContextChain, ChatKVMem
from langchain_kvmem.convert import to_messages

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
ANSWER = f"I look it up.\n{CALL}"
ARGUMENTS = {"city": "Paris", "days": 2}


def chat(*answers: str, **fields: Any) -> ChatKVMem:
    return ChatKVMem(mem=KVMem(says(agent_model(), *answers)), **{"max_tokens": 150, **fields})


def added(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total


def test_text_and_calls_stream_with_tools_bound() -> None:
    """Many chunks, whose sum is what invoke gives; no chunk of text has any markup."""
    model = chat(ANSWER, ANSWER, ANSWER).bind_tools([WEATHER, NOW])
    chunks = list(model.stream("What is the weather?"))
    awaited = asyncio.run(_stream(model))
    whole = model.invoke("What is the weather?")
    texts = [chunk.content for chunk in chunks if chunk.content]
    assert len(texts) > 5
    assert not any("<" in str(text) or "{" in str(text) for text in texts)
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 5
    for total in (added(chunks), added(awaited)):
        assert (total.content, total.invalid_tool_calls) == (whole.content, [])
        assert [(c["name"], c["args"]) for c in total.tool_calls] == [("weather", ARGUMENTS)]
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("weather", ARGUMENTS)]
    assert whole.content == "I look it up."


async def _stream(model: Any) -> list[AIMessageChunk]:
    return [chunk async for chunk in model.astream("What is the weather?")]


@pytest.mark.parametrize("tokens", [30, 45, 58, 62, 75, 82])
def test_a_call_that_is_cut_off_is_invalid(tokens: int) -> None:
    """LangChain completes JSON that was cut off, but a tool must not run with half of its arguments."""
    model = chat(ANSWER, ANSWER, max_tokens=tokens).bind_tools([WEATHER])
    total, whole = added(list(model.stream("?"))), model.invoke("?")
    for message in (total, whole):
        assert (message.tool_calls, len(message.invalid_tool_calls)) == ([], 1)
        assert message.content == "I look it up."


def test_thoughts_are_beside_the_content() -> None:
    """In additional_kwargs, whole and in chunks, and back to the template from there."""
    model = chat("<think>Hm.</think>Yes.", "<think>Hm.</think>Yes.")
    whole, total = model.invoke("?"), added(list(model.stream("?")))
    for message in (whole, total):
        assert (message.content, message.additional_kwargs["reasoning_content"].strip()) == ("Yes.", "Hm.")
    (given,) = to_messages([whole])
    assert given["reasoning_content"] == "Hm."
    blocks = AIMessage([{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "Yes."}])
    assert to_messages([blocks]) == [{"role": "assistant", "content": ["Yes."], "reasoning_content": "Hm."}]


def test_variables_of_the_template() -> None:
    """At init and per call; other spellings say which is right, and the cache of answers tells them apart."""
    model = chat("A.", "B.", chat_template_kwargs={"enable_thinking": False})
    with prompts() as seen:
        model.invoke("?")
        model.invoke("?", chat_template_kwargs={"enable_thinking": True})
    assert [text.endswith("<think>\n") for text in seen] == [False, True]
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        ChatKVMem(model="smollm2", enable_thinking=False)
    other = ChatKVMem(mem=model.mem, max_tokens=150)
    assert other._get_llm_string() != model._get_llm_string()  # noqa: SLF001
    assert model._get_llm_string() != model._get_llm_string(chat_template_kwargs={"x": 1})  # noqa: SLF001


def test_an_agent_is_interrupted_edited_and_resumed(tmp_path: Path) -> None:
    """From a checkpoint on disk, by an agent of another process: the edited call is made, and the loop ends."""
    made: list[str] = []

    @tool
    def weather(city: str, days: int = 1) -> str:
        """The weather in a city."""
        made.append(city)
        return "Sunny."

    config: Any = {"configurable": {"thread_id": "t"}}
    saved = str(tmp_path / "checkpoints.sqlite")
    with SqliteSaver.from_conn_string(saved) as saver:
        agent: Any = create_agent(chat(ANSWER), [weather], checkpointer=saver, interrupt_before=["tools"])
        agent.invoke({"messages": [HumanMessage("What is the weather?")]}, config)
        asked = agent.get_state(config).values["messages"][-1]
        assert (made, asked.tool_calls[0]["args"]["city"]) == ([], "Paris")
        edited = asked.model_copy(update={"tool_calls": [{**asked.tool_calls[0], "args": {"city": "Rome"}}]})
        agent.update_state(config, {"messages": [edited]})
    with SqliteSaver.from_conn_string(saved) as saver, prompts() as seen:
        agent = create_agent(chat("It is sunny."), [weather], checkpointer=saver, interrupt_before=["tools"])
        result = agent.invoke(None, config)
    assert made == ["Rome"]
    assert [type(message) for message in result["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert result["messages"][-1].content == "It is sunny."
    assert '"city": "Rome"' in seen[0]
    assert "Sunny." in seen[0]


def test_a_chain_passes_variables_on_to_the_template() -> None:
    """For all of its calls, and for one; thoughts are not a part of its answer."""
    mem = KVMem(says(agent_model(), "Hm.</think>Yes.", "No."))
    chain = CachedContextChain.from_texts(
        ["It is."], mem, max_tokens=40, chat_template_kwargs={"enable_thinking": True}
    )
    with prompts() as seen:
        assert chain.invoke({"input": "Is it?"})["answer"] == "Yes."
        assert chain.invoke({"input": "Is it?"}, chat_template_kwargs={"enable_thinking": False})["answer"] == "No."
    assert [text.endswith("<think>\n") for text in seen] == [True, False]


def test_the_profile_tells_what_the_template_can_do() -> None:
    """Tools in a format that can be read, and thoughts."""
    model = chat()
    assert (model.profile["tool_calling"], model.profile["reasoning_output"]) == (True, True)  # type: ignore[index]
    plain = ChatKVMem(mem=KVMem(tiny_model())).profile
    assert plain is not None
    assert (plain["tool_calling"], plain["tool_choice"], plain["reasoning_output"]) == (False, True, False)
