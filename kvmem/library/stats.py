"""Statistics of a `KVMem`."""

from __future__ import annotations

from dataclasses import dataclass

from kvmem.store.base import StoreStats


@dataclass(frozen=True)
class DocumentStats:
    """Statistics of one document.

    Attributes:
        document_id: Id of the document.
        chunks: Number of chunks.
        tokens: Number of tokens.
        entries: Number of stored entries of its chunks, in any context.
        bytes: Size of these entries, in bytes.

    Example:
        ```python
        for document in mem.stats().by_document:
            print(document.document_id, document.tokens, document.bytes)
        ```
    """

    document_id: str
    chunks: int
    tokens: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    """Statistics of a `KVMem`.

    Attributes:
        documents: Number of documents in the corpus.
        chunks: Number of chunks in the corpus.
        tokens: Number of tokens in the corpus.
        store: Statistics of all stored entries in this namespace, including those of other texts.
        by_document: Statistics of each document.

    Example:
        ```python
        stats = mem.stats()
        print(stats.documents, stats.tokens, stats.store)
        ```
    """

    documents: int
    chunks: int
    tokens: int
    store: StoreStats
    by_document: tuple[DocumentStats, ...]
