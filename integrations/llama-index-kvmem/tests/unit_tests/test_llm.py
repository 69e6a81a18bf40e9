from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers import gaps_while_busy
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from kvmem import InputError, KVMem, LanguageModel
from llama_index_kvmem import KVMemLLM

HELLO = [ChatMessage(role=MessageRole.USER, content="Hello")]
NODES = [
    TextNode(
        id_=str(n), text=f"The {name} leaves at {n + 5} and costs {3 * n + 4} crowns. Dogs pay half of the fare, too."
    )
    for n, name in enumerate(("ferry", "night train", "tram", "cable car"))
]


@pytest.fixture
def llm(mem: KVMem) -> KVMemLLM:
    return KVMemLLM(mem=mem, max_new_tokens=8)


def test_it_is_an_llm_of_llama_index(llm: KVMemLLM, mem: KVMem) -> None:
    """By class, and by its metadata."""
    assert issubclass(KVMemLLM, FunctionCallingLLM)
    assert isinstance(llm, LLM)
    assert mem.model.window - 100 < llm.metadata.context_window < mem.model.window
    assert llm.metadata.num_output == 8
    assert llm.metadata.is_chat_model
    assert llm.metadata.is_function_calling_model
    assert KVMemLLM(model_name="nothing is loaded").model_name == "nothing is loaded"


def test_the_arguments_of_hugging_face_llm_are_taken_or_refused(model: LanguageModel, mem: KVMem) -> None:
    """None is dropped in silence."""
    llm = KVMemLLM(
        model=model.hf,
        tokenizer=model.tokenizer,
        context_window=500,
        max_new_tokens=6,
        tokenizer_outputs_to_remove=["x"],
    )
    text = llm.complete("Hello").text
    assert text == KVMemLLM(mem=mem, max_new_tokens=6).complete("Hello").text
    assert llm.metadata.context_window == 500
    first = model.tokenize(text, markup=False)[0]
    stopped = KVMemLLM(mem=mem, max_new_tokens=6, stopping_ids=list(range(3, 300)))
    assert stopped.complete("Hello").raw["usage"]["completion_tokens"] == 1
    assert first >= 3
    llm.engine.close()
    for wrong in (
        {"nonsense": 1},
        {"tokenizer_name": "other"},
        {"tokenizer_kwargs": {"max_length": 5}},
        {"blend": "typo"},
        {"model_kwargs": {"no_such": 1}},
        {"mem": mem, "namespace": "anna"},
    ):
        with pytest.raises(InputError):
            KVMemLLM(**wrong)


def test_chat_and_complete_give_one_answer_in_every_form(llm: KVMemLLM) -> None:
    """Whole, streamed, and both in async; deltas concatenate to the text, and the last chunk has the usage."""
    text = llm.chat(HELLO).message.content
    assert llm.complete("Hello").text == text

    async def collect() -> list[Any]:
        chats = [chunk async for chunk in await llm.astream_chat(HELLO)]
        completions = [chunk async for chunk in await llm.astream_complete("Hello")]
        return [await llm.achat(HELLO), await llm.acomplete("Hello"), chats, completions]

    chat, completion, chats, completions = asyncio.run(collect())
    assert (chat.message.content, completion.text) == (text, text)
    for chunks in (chats, completions, list(llm.stream_chat(HELLO)), list(llm.stream_complete("Hello"))):
        assert "".join(chunk.delta for chunk in chunks) == text
        assert chunks[-1].raw["usage"]["completion_tokens"] == 8
        assert str(chunks[-1]).endswith(text)


def test_arguments_of_a_call_take_effect(llm: KVMemLLM) -> None:
    """max_tokens by both names, stop, and temperature with a seed."""
    for name in ("max_tokens", "max_new_tokens"):
        assert llm.chat(HELLO, **{name: 3}).raw["usage"]["completion_tokens"] == 3
    text = llm.complete("Hello").text
    assert llm.complete("Hello", stop=[text[2]]).text == text[: text.index(text[2])]
    assert len({llm.complete("Hello", temperature=2.0, seed=seed).text for seed in range(4)}) > 1


def test_nothing_in_raw_is_a_tensor(llm: KVMemLLM) -> None:
    """raw is JSON, so that events and caches can keep it."""
    import json

    assert json.loads(json.dumps(llm.chat(HELLO).raw))["plan"]["mode"] == "whole"


def test_tokens_are_counted_where_llama_index_looks(mem: KVMem) -> None:
    """TokenCountingHandler finds the prompt's and the answer's, once per call."""
    counter = TokenCountingHandler()
    llm = KVMemLLM(mem=mem, max_new_tokens=5, callback_manager=CallbackManager([counter]))
    usage = llm.chat(HELLO).raw["usage"]
    llm.complete("Hello")
    assert len(counter.llm_token_counts) == 2
    assert counter.completion_llm_token_count == 10
    assert counter.prompt_llm_token_count == 2 * usage["prompt_tokens"]


def test_events_come_in_order_and_once(llm: KVMemLLM) -> None:
    """Start, then end; with progress between them when streamed."""
    seen: list[str] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            seen.append(type(event).__name__)

    dispatcher = get_dispatcher()
    handler = Handler()
    dispatcher.add_event_handler(handler)
    try:
        llm.chat(HELLO)
        assert seen == ["LLMChatStartEvent", "LLMChatEndEvent"]
        seen.clear()
        list(llm.stream_chat(HELLO))
    finally:
        dispatcher.event_handlers.remove(handler)
    assert (seen[0], seen[-1]) == ("LLMChatStartEvent", "LLMChatEndEvent")
    assert set(seen[1:-1]) == {"LLMChatInProgressEvent"}


def test_the_loop_runs_while_the_engine_is_busy(llm: KVMemLLM, model: LanguageModel) -> None:
    """While calls wait for the model, which another thread holds, no call holds up the event loop."""

    async def stream() -> None:
        async for _ in await llm.astream_chat(HELLO):
            pass

    gaps = gaps_while_busy(model, [lambda: llm.achat(HELLO), stream])
    assert len(gaps) > 50
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.05


class Trip(BaseModel):
    """Where to."""

    goal: str = Field(max_length=5, pattern="^[a-z]*$")
    days: int = Field(ge=0, le=99)


def test_functions_are_called_and_structures_filled_even_by_random_weights(mem: KVMem) -> None:
    """A required call has the function's arguments; structured_predict gives an instance."""
    llm = KVMemLLM(mem=mem, max_new_tokens=120)

    def plan(days: int) -> str:
        """Plan a trip."""
        return f"{days} days"

    tool = FunctionTool.from_defaults(plan)
    response = llm.chat_with_tools([tool], user_msg="Plan", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "plan"
    assert isinstance(call.tool_kwargs["days"], int)
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(llm.chat(HELLO))
    cut = llm.chat_with_tools([tool], user_msg="Plan", tool_required=True, max_tokens=4)
    with pytest.raises(ValueError, match="raise max_tokens"):
        llm.get_tool_calls_from_response(cut)
    assert isinstance(llm.structured_predict(Trip, PromptTemplate("Plan a trip.")), Trip)
    assert isinstance(get_program_for_llm(Trip, PromptTemplate("Plan."), llm)(), Trip)


def test_an_index_answers_with_it_unchanged_and_reuses_its_nodes(mem: KVMem) -> None:
    """VectorStoreIndex(...).as_query_engine(llm=...): from the second query on, nodes are not read again."""
    raws: list[Any] = []
    llm = KVMemLLM(mem=mem, max_new_tokens=2)

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            if type(event).__name__ == "LLMChatEndEvent":
                raws.append(event.response.raw)

    handler = Handler()
    get_dispatcher().add_event_handler(handler)
    try:
        index = VectorStoreIndex(NODES, embed_model=MockEmbedding(embed_dim=3))
        engine = index.as_query_engine(llm=llm, similarity_top_k=4)
        for question in ("When does the ferry leave?", "What does the tram cost?"):
            response = engine.query(question)
            assert len(response.source_nodes) == 4
    finally:
        get_dispatcher().event_handlers.remove(handler)
    usage = raws[-1]["usage"]
    assert usage["exact"] + usage["reused"] > 0.8 * sum(len(node.text) for node in NODES)


def test_what_a_text_model_cannot_read_is_an_error(llm: KVMemLLM) -> None:
    """Images are refused with a reason."""
    message = ChatMessage(role=MessageRole.USER, blocks=[ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(InputError, match="reads text"):
        llm.chat([message])
