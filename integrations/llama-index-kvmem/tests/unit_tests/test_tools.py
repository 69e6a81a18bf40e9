from __future__ import annotations

import asyncio
from typing import Any

from helpers import agent_model, prompts, says
from llama_index.core import Document
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ThinkingBlock
from llama_index.core.tools import FunctionTool

from kvmem import KVMem
from llama_index_kvmem import KVMemLLM, KVMemQueryEngine
from llama_index_kvmem.convert import to_message

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"I look it up.\n{CALL}"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


TOOL = FunctionTool.from_defaults(weather)


def llm(*answers: str, **fields: Any) -> KVMemLLM:
    return KVMemLLM(KVMem(says(agent_model(), *answers)), **{"max_new_tokens": 150, **fields})


def test_text_and_calls_stream_with_tools() -> None:
    """Deltas of text without markup; calls grow in the message, and the last response has them all."""
    model = llm(ANSWER, ANSWER)
    seen = list(model.stream_chat_with_tools([TOOL], user_msg="What is the weather?"))

    async def main() -> list[Any]:
        stream = await model.astream_chat_with_tools([TOOL], user_msg="What is the weather?")
        return [response async for response in stream]

    for responses in (seen, asyncio.run(main())):
        deltas = [response.delta for response in responses if response.delta]
        assert ("".join(deltas), len(deltas) > 5) == ("I look it up.", True)
        growing = [r.message.additional_kwargs["tool_calls"][0] for r in responses if r.message.additional_kwargs]
        lengths = [len(call["function"]["arguments"]) for call in growing]
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 5
        (call,) = model.get_tool_calls_from_response(responses[-1])
        assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Paris"})
        assert responses[-1].message.content == "I look it up."


def test_a_call_that_is_cut_off_stays_text() -> None:
    """It is not made, and nothing of it is lost."""
    response = llm(ANSWER, max_new_tokens=60).chat_with_tools([TOOL], user_msg="?")
    assert "tool_calls" not in response.message.additional_kwargs
    assert response.message.content == ANSWER.replace(".\n", ".\n")[:60]


def test_thoughts_are_blocks_of_their_own() -> None:
    """Whole and while they are written, and back to the template from there."""
    model = llm("<think>Hm.</think>Yes.", "<think>Hm.</think>Yes.")
    whole = model.chat([ChatMessage(content="?")])
    *growing, last = model.stream_chat([ChatMessage(content="?")])
    for response in (whole, last):
        thought, text = response.message.blocks
        assert isinstance(thought, ThinkingBlock)
        assert isinstance(text, TextBlock)
        assert (thought.content, text.text) == ("Hm.", "Yes.")
    assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in growing).strip() == "Hm."
    assert "".join(r.delta or "" for r in growing) == "Yes."
    assert to_message(whole.message) == {"role": "assistant", "content": ["Yes."], "reasoning_content": "Hm."}
    assert str(llm("<think>Hm.</think>Yes.").complete("?")) == "Yes."


def test_variables_of_the_template() -> None:
    """At init and per call."""
    model = llm("A.", "B.", chat_template_kwargs={"enable_thinking": True})
    with prompts() as seen:
        model.chat([ChatMessage(content="?")])
        model.chat([ChatMessage(content="?")], chat_template_kwargs={"enable_thinking": False})
    assert [text.endswith("<think>\n") for text in seen] == [True, False]


def test_a_function_agent_finishes_its_loop() -> None:
    """It sees its own call and the result of the tool."""

    async def main() -> Any:
        agent = FunctionAgent(tools=[TOOL], llm=llm(ANSWER, "It is sunny."), system_prompt="Be brief.")
        return await agent.run(user_msg="What is the weather?")

    with prompts() as seen:
        result = asyncio.run(main())
    assert str(result) == "It is sunny."
    assert [call.tool_kwargs for call in result.tool_calls] == [{"city": "Paris"}]
    assert CALL in seen[1]
    assert "Sunny in Paris." in seen[1]
    assert MessageRole.TOOL.value in seen[1]


def test_a_query_engine_passes_variables_on_to_the_template() -> None:
    """Those of its LLM, and its own."""
    mem = KVMem(says(agent_model(), "Hm.</think>Yes.", "No."))
    given = {"enable_thinking": True}
    engine = KVMemQueryEngine.from_documents([Document(text="It is.")], mem, chat_template_kwargs=given)
    with prompts() as seen:
        assert str(engine.query("Is it?")) == "Yes."
        assert str(KVMemQueryEngine.from_documents([Document(text="It is.")], mem).query("Is it?")) == "No."
    assert [text.endswith("<think>\n") for text in seen] == [True, False]
