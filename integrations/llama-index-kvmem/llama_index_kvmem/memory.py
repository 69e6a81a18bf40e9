"""KVMemMemoryBlock: long-term memory for LlamaIndex's `Memory`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.memory import BaseMemoryBlock

from kvmem import KVMemError, Memory
from llama_index_kvmem.convert import DOCUMENT

logger = logging.getLogger("kvmem")


class KVMemMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """Recalls memories as system messages that keep their identity, so that a `KVMemLLM` reads each of them once.

    For `Memory.from_defaults(memory_blocks=[...])`. What falls out of the short-term memory is remembered: the messages
    of the user, as they are. One that cannot be remembered is logged.

    memory: where memories are kept. k: how many are recalled beside the pinned ones.
    """

    name: str = Field(default="kvmem")
    k: int = Field(default=5, ge=0)
    _memory: Memory = PrivateAttr()

    def __init__(self, memory: Memory, **fields: Any) -> None:
        super().__init__(**fields)
        self._memory = memory

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> list[ChatMessage]:
        query = next((m.content or "" for m in reversed(messages or []) if m.role == MessageRole.USER), "")
        found = await asyncio.to_thread(self._memory.context, query, self.k)
        return [
            ChatMessage(role=MessageRole.SYSTEM, content=document.text, additional_kwargs={DOCUMENT: document.id})
            for document in found
        ]

    async def _aput(self, messages: list[ChatMessage]) -> None:
        await asyncio.to_thread(
            self._remember, [m.content for m in messages if m.role == MessageRole.USER and m.content]
        )

    def _remember(self, texts: Sequence[str]) -> None:
        for text in texts:
            identity = hashlib.sha256(text.encode()).hexdigest()[:32]
            try:
                if text.strip() and self._memory.find(identity) is None:
                    self._memory.remember(text, id=identity)
            except KVMemError as error:
                # LlamaIndex has taken the messages out of its own memory by now, and the answer is not told yet.
                logger.warning("kvmem: a text of %d characters is not remembered: %s", len(text), error)

    async def atruncate(self, content: list[ChatMessage], tokens_to_truncate: int) -> list[ChatMessage] | None:
        """The last recalled goes first; pinned memories are in front."""
        kept, room = list(content), tokens_to_truncate
        while kept and room > 0:
            room -= self._memory.mem.model.count_tokens(kept.pop().content or "")
        return kept or None
