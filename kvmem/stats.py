"""What a `KVMem` keeps, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvmem.store.base import StoreStats


@dataclass(frozen=True)
class DocumentStats:
    """One document: its chunks and tokens, and the entries and bytes of KV kept of them, in any context."""

    document_id: str
    chunks: int
    tokens: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    """documents, chunks, tokens: of the corpus. store: what is kept in this namespace, of the corpus and of
    everything else read."""

    documents: int
    chunks: int
    tokens: int
    store: StoreStats
    by_document: tuple[DocumentStats, ...]
