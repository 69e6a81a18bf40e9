from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import open_mem
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.memory import Memory as LlamaMemory

from kvmem import KVMem, LanguageModel, Memory
from llama_index_kvmem import KVMemLLM, KVMemMemoryBlock


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=text)


async def test_memories_reach_the_model_with_their_identity(mem: KVMem) -> None:
    """The block's messages are context of a KVMemLLM: each has its own cache, whatever is asked beside it."""
    memory = Memory(mem)
    memory.remember("The user is Anna, a baker, who lives at the harbour.", id="profile", pinned=True)
    memory.remember("The ferry to the island leaves at nine in the evening.")
    block = KVMemMemoryBlock(memory, k=1)
    chat = LlamaMemory.from_defaults(token_limit=4000, memory_blocks=[block], tokenizer_fn=list)
    await chat.aput(user("When does the ferry leave?"))
    messages = await chat.aget()
    assert messages[0].additional_kwargs["kvmem_document"] == "memory/profile"
    response = await KVMemLLM(mem=mem, max_new_tokens=2).achat(messages)
    usage = response.raw["usage"]
    assert usage["exact"] + usage["reused"] + usage["recomputed"] > 90
    assert usage["computed"] < 110


async def test_what_falls_out_of_the_history_is_remembered(model: LanguageModel, tmp_path: Path) -> None:
    """The user's messages, once each, across a restart; truncation drops the last recalled first."""
    with open_mem(model, tmp_path / "kv") as mem:
        block = KVMemMemoryBlock(Memory(mem))
        said = [user("I like tea."), ChatMessage(role=MessageRole.ASSISTANT, content="Good."), user("I like tea.")]
        await block.aput(said, from_short_term_memory=True)
    with open_mem(model, tmp_path / "kv") as mem:
        block = KVMemMemoryBlock(Memory(mem))
        found = await block.aget([user("tea?")])
        assert [m.content for m in found] == ["I like tea."]
        Memory(mem).remember("I am Bob.", pinned=True)
        both = await block.aget([user("tea?")])
        assert [m.content for m in await block.atruncate(both, 1) or []] == ["I am Bob."]
        assert await block.atruncate(both, 10_000) is None


async def test_a_text_that_cannot_be_remembered_costs_nothing_else(model: LanguageModel, caplog: Any) -> None:
    """The history has let go of it by then: it is logged, and the others are remembered."""
    with open_mem(model, None, max_document_chars=20) as mem:
        block = KVMemMemoryBlock(Memory(mem))
        await block.aput([user("This is longer than twenty characters."), user("I like tea.")])
        assert [item.text for item in Memory(mem).list()] == ["I like tea."]
    assert "not remembered" in caplog.text
