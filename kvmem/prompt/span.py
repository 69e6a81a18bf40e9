"""Span: tokens that are cached as a unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvmem.kv.entry import digest_tokens


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a prompt that are cached as a unit. document: id of the document it belongs to, if any."""

    token_ids: tuple[int, ...]
    document: str | None = None

    @cached_property
    def digest(self) -> str:
        return digest_tokens(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)
