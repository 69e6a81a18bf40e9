"""Prompts that a chain has built for its own model."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmem.library.request import Request

if TYPE_CHECKING:
    from langchain_kvmem.chat_model import ChatKVMem


@dataclass(frozen=True)
class Prepared:
    """A prompt that a chain has built for the next answer of its own model; other models have nothing to do with it."""

    model: ChatKVMem
    request: Request


PREPARED: ContextVar[Prepared | None] = ContextVar("kvmem_prepared", default=None)
