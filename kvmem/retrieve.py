"""Retrieval for corpora that do not fit the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import bm25s

from kvmem.document import Chunk

# Words, single digits and letters among them; scripts without spaces by character.
_TERM = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"


def _terms(texts: list[str]) -> list[list[str]]:
    terms: list[list[str]] = bm25s.tokenize(
        texts, token_pattern=_TERM, stopwords="en", return_ids=False, show_progress=False
    )
    return terms


class Retriever(Protocol):
    """What a retriever of your own has to do."""

    def score(self, question: str, chunks: Sequence[Chunk]) -> Sequence[float]:
        """One relevance per chunk, in the order given; higher is better, 0 or less is irrelevant."""


class BM25Retriever:
    """BM25 (Robertson and Zaragoza, 2009) by bm25s; the index is kept while the chunks stay the same."""

    def __init__(self) -> None:
        self._indexed: tuple[str, ...] = ()
        self._index: bm25s.BM25 | None = None

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        texts = tuple(chunk.text for chunk in chunks)
        if not texts:
            return []
        if texts != self._indexed:
            terms = _terms(list(texts))
            # Text of stop words alone leaves nothing to index.
            self._index = bm25s.BM25() if any(terms) else None
            if self._index is not None:
                self._index.index(terms, show_progress=False)
            self._indexed = texts
        if self._index is None:
            return [0.0] * len(texts)
        known = [term for term in _terms([question])[0] if term in self._index.vocab_dict]
        if not known:
            return [0.0] * len(texts)
        return [float(s) for s in self._index.get_scores(known)]
