"""Tests for retrieval by words."""

from __future__ import annotations

import pytest

from kvmem.text import retrieval
from kvmem.text.document import Chunk
from kvmem.text.retrieval import BM25Retriever


def _chunks(*texts: str) -> list[Chunk]:
    return [Chunk(text, f"d{number}", 0, {}) for number, text in enumerate(texts)]


def test_chunks_are_indexed_again_only_when_their_texts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[int] = []
    real = retrieval._terms  # noqa: SLF001
    monkeypatch.setattr(retrieval, "_terms", lambda texts: tokenized.append(len(texts)) or real(texts))
    retriever = BM25Retriever()
    chunks = _chunks("The rent is 3,200 euros.", "The roof is red.", "The cat sleeps.")
    first = retriever.score("How much is the rent?", chunks)
    assert max(range(3), key=lambda index: first[index]) == 0
    assert tokenized == [3, 1]
    assert retriever.score("How much is the rent?", chunks) == first
    assert retriever.score("How much is the rent?", _chunks(*(chunk.text for chunk in chunks))) == first
    assert tokenized == [3, 1, 1, 1]
    changed = [*chunks[:2], *_chunks("The rent of the garage is 90 euros.")]
    assert retriever.score("What about the garage?", changed)[2] > 0
    assert tokenized == [3, 1, 1, 1, 3, 1]


def test_chunks_without_words_score_nothing() -> None:
    retriever = BM25Retriever()
    assert retriever.score("the", _chunks("the", "of the")) == [0.0, 0.0]
    assert retriever.score("rent", []) == []
