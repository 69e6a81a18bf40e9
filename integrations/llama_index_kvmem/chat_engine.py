"""KVMemChatEngine: a conversation over documents read once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from threading import Thread
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    MessageRole,
)
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.schema import BaseNode

from kvmem import AnswerStream, KVMem
from llama_index_kvmem.convert import count, describe, said, to_documents, to_nodes
from llama_index_kvmem.llm import to_message, without_memories


class KVMemChatEngine(BaseChatEngine):
    """In the place of `ContextChatEngine`: the documents stand in the system message, and every turn reads its new
    message only.

    mem: the engine, with its documents. memory: keeps the history; LlamaIndex's `Memory` by default. system: another
    system prompt than `mem` has, behind which documents are blended. options: arguments of `KVMem.chat` for every turn,
    such as `max_tokens` or `blend`.
    """

    def __init__(
        self, mem: KVMem, *, memory: BaseMemory | None = None, system: str | None = None, **options: Any
    ) -> None:
        self.mem = mem
        self.memory: BaseMemory = memory if memory is not None else Memory.from_defaults(token_limit=mem.model.window)
        self.system = system
        self.options = options

    @classmethod
    def from_documents(
        cls, documents: Iterable[BaseNode], model: str | KVMem = "smollm2", store: str | None = None, **options: Any
    ) -> KVMemChatEngine:
        """Read documents or nodes into an engine; those it has read before cost nothing."""
        mem = model if isinstance(model, KVMem) else KVMem(model, store, system=options.pop("system", None))
        mem.add_all(to_documents(documents))
        return cls(mem, **options)

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        if chat_history is not None:
            self.memory.set(chat_history)
        answer = self._open(message, self.memory.get(input=message)).answer
        self.memory.put(said(MessageRole.USER, message))
        self.memory.put(said(MessageRole.ASSISTANT, answer.text))
        metadata = {"plan": describe(answer.plan), "usage": count(answer.usage)}
        return AgentChatResponse(response=answer.text, source_nodes=to_nodes(answer.sources), metadata=metadata)

    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        if chat_history is not None:
            await self.memory.aset(chat_history)
        history = await self.memory.aget(input=message)
        answer = await (await asyncio.to_thread(self._open, message, history)).wait()
        await self.memory.aput(said(MessageRole.USER, message))
        await self.memory.aput(said(MessageRole.ASSISTANT, answer.text))
        metadata = {"plan": describe(answer.plan), "usage": count(answer.usage)}
        return AgentChatResponse(response=answer.text, source_nodes=to_nodes(answer.sources), metadata=metadata)

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        if chat_history is not None:
            self.memory.set(chat_history)
        stream = self._open(message, self.memory.get(input=message))
        sources = to_nodes(stream.sources)
        self.memory.put(said(MessageRole.USER, message))

        def pieces() -> ChatResponseGen:
            text = ""
            with stream:
                for piece in stream:
                    text += piece
                    yield ChatResponse(message=said(MessageRole.ASSISTANT, text), delta=piece)

        response = StreamingAgentChatResponse(chat_stream=pieces(), source_nodes=sources)
        # LlamaIndex's response is filled, and its history written, by a thread of its own.
        thread = Thread(target=response.write_response_to_history, args=(self.memory,), daemon=True)
        response.write_response_to_history_thread = thread
        thread.start()
        return response

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        if chat_history is not None:
            await self.memory.aset(chat_history)
        stream = await asyncio.to_thread(self._open, message, await self.memory.aget(input=message))
        sources = to_nodes(await stream.wait_for_sources())
        await self.memory.aput(said(MessageRole.USER, message))

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            with stream:
                async for piece in stream:
                    text += piece
                    yield ChatResponse(message=said(MessageRole.ASSISTANT, text), delta=piece)

        response = StreamingAgentChatResponse(achat_stream=pieces(), source_nodes=sources)
        response.awrite_response_to_history_task = asyncio.create_task(response.awrite_response_to_history(self.memory))
        return response

    def reset(self) -> None:
        self.memory.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        return self.memory.get_all()

    def _open(self, message: str, history: list[ChatMessage]) -> AnswerStream:
        spoken, remembered = without_memories(history)
        messages = [to_message(old) for old in spoken] + [{"role": "user", "content": message}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        # Documents are in front, since they change least.
        return self.mem.stream_chat(messages, context=[*self.mem.list(), *remembered] or None, **self.options)
