"""Prompts that a query engine has built for its own LLM."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from llama_index.core.base.llms.types import ChatMessage

from kvmem import AnswerStream
from kvmem.library.request import Request

if TYPE_CHECKING:
    from llama_index_kvmem.llm import KVMemLLM


class Prepared:
    """A prompt that a query engine has built for a call of an LLM with these messages, and the answer to it.

    Calls that event handlers make meanwhile are not that call.
    """

    def __init__(self, llm: KVMemLLM, messages: Sequence[ChatMessage], request: Request) -> None:
        self._llm, self._texts = llm, _texts(messages)
        self.request = request
        self.stream: AnswerStream | None = None

    def is_for(self, llm: KVMemLLM, messages: Sequence[ChatMessage]) -> bool:
        return llm is self._llm and self.stream is None and _texts(messages) == self._texts


PREPARED: ContextVar[Prepared | None] = ContextVar("kvmem_prepared", default=None)


def _texts(messages: Sequence[ChatMessage]) -> list[tuple[str, str | None]]:
    return [(message.role.value, message.content) for message in messages]
