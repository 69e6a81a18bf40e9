from __future__ import annotations

import threading

import pytest
from helpers import prompts
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.memory import ChatMemoryBuffer

from kvmem import KVMem
from llama_index_kvmem import KVMemChatEngine

DOCUMENTS = [
    Document(text="The rent is due on the first day of the month.", id_="l"),
    Document(text="The machine has two boilers.", id_="m"),
]


@pytest.fixture
def engine(mem: KVMem) -> KVMemChatEngine:
    return KVMemChatEngine.from_documents(DOCUMENTS, mem, max_tokens=6)


def test_turns_continue_the_conversation_and_read_little(engine: KVMemChatEngine) -> None:
    """History is kept, sources are named, and a later turn computes its own message only."""
    assert isinstance(engine, BaseChatEngine)
    first = engine.chat("When is the rent due?")
    assert [n.node.ref_doc_id for n in first.source_nodes] == ["l", "m"]
    second = engine.chat("And the boilers?")
    assert [m.role.value for m in engine.chat_history] == ["user", "assistant"] * 2
    assert engine.chat_history[3].content == second.response
    assert second.metadata is not None
    assert second.metadata["usage"]["computed"] < 100 < second.metadata["usage"]["exact"]
    engine.reset()
    assert engine.chat_history == []
    assert engine.chat("When is the rent due?").response == first.response


async def test_all_four_ways_say_the_same(engine: KVMemChatEngine) -> None:
    """Whole and streamed, sync and async; histories grow alike."""
    expected = engine.chat("Why?").response
    engine.reset()
    assert "".join(engine.stream_chat("Why?").response_gen) == expected
    assert engine.chat_history[-1].content == expected
    engine.reset()
    assert (await engine.achat("Why?")).response == expected
    engine.reset()
    response = await engine.astream_chat("Why?")
    assert "".join([piece async for piece in response.async_response_gen()]) == expected
    assert [m.role for m in engine.chat_history] == [MessageRole.USER, MessageRole.ASSISTANT]


def test_a_history_may_be_given_and_a_memory_too(mem: KVMem) -> None:
    """As to LlamaIndex's own chat engines."""
    memory = ChatMemoryBuffer.from_defaults(token_limit=500, tokenizer_fn=list)
    engine = KVMemChatEngine(mem, memory=memory, max_tokens=4)
    engine.chat("Why?", chat_history=[ChatMessage(role=MessageRole.USER, content="Hello")])
    assert [m.content for m in memory.get_all()][:2] == ["Hello", "Why?"]


def test_a_turn_that_fails_leaves_no_trace(engine: KVMemChatEngine) -> None:
    """Streamed or not, the history is as it was."""
    for chat in (engine.chat, engine.stream_chat):
        with pytest.raises(ValueError, match=r"context size|window"):
            chat("word " * 2000)
        assert engine.chat_history == []


def test_another_system_prompt_stands_before_the_documents(mem: KVMem) -> None:
    """It is in the prompt, and the documents are not read again for it."""
    engine = KVMemChatEngine.from_documents(DOCUMENTS, mem, max_tokens=2, system="Be brief, and rhyme.")
    found = engine.chat("When?").metadata
    assert found is not None
    with prompts() as seen:
        engine.chat("When?")
    assert "Be brief, and rhyme.\n\nThe rent is due" in seen[0]
    other = KVMemChatEngine.from_documents(DOCUMENTS, mem, max_tokens=2, system="Be long.").chat("When?").metadata
    assert other is not None
    assert other["usage"]["exact"] > 60


async def test_the_corpus_is_listed_off_the_event_loop(
    engine: KVMemChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows lie in a store, which may be slow."""
    threads: list[int] = []
    engine.mem.add("The lamps are old.")
    engine = KVMemChatEngine(engine.mem, max_tokens=2)
    real = engine.mem.chunks
    monkeypatch.setattr(engine.mem, "chunks", lambda: threads.append(threading.get_ident()) or real())
    await engine.achat("Why?")
    response = await engine.astream_chat("Why?")
    assert [piece async for piece in response.async_response_gen()]
    assert len(threads) == 2
    assert threading.get_ident() not in threads
