"""Retrieval for corpora that do not fit the window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import bm25s
import numpy as np

from kvmem.document import Chunk
from kvmem.errors import InputError

# It sets itself to DEBUG, and would talk through every application's handlers.
logging.getLogger("bm25s").setLevel(logging.WARNING)

# Words, single digits and letters among them; scripts without spaces by character.
_TERM = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"


def _terms(texts: list[str]) -> list[list[str]]:
    terms: list[list[str]] = bm25s.tokenize(
        texts, token_pattern=_TERM, stopwords="en", return_ids=False, show_progress=False
    )
    return terms


class Retriever(Protocol):
    """What a retriever of your own has to do.

    One whose scores are comparable over the whole corpus may say so by an attribute `comparable = True`: the plan may
    then take documents whole, and chunks next to those that score best.
    """

    def score(self, question: str, chunks: Sequence[Chunk]) -> Sequence[float]:
        """One relevance per chunk, in the order given; higher is better, 0 or less is irrelevant."""


class BM25Retriever:
    """BM25 (Robertson and Zaragoza, 2009) by bm25s; the index is kept while the chunks stay the same."""

    comparable = True

    def __init__(self) -> None:
        # Replaced as one, so that threads may share a retriever.
        self._kept: tuple[tuple[str, ...], bm25s.BM25 | None] = ((), None)

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        texts = tuple(chunk.heading + chunk.text for chunk in chunks)
        if not texts:
            return []
        indexed, index = self._kept
        if texts != indexed:
            terms = _terms(list(texts))
            # Text of stop words alone leaves nothing to index.
            index = bm25s.BM25() if any(terms) else None
            if index is not None:
                index.index(terms, show_progress=False)
            self._kept = (texts, index)
        if index is None:
            return [0.0] * len(texts)
        known = [term for term in _terms([question])[0] if term in index.vocab_dict]
        if not known:
            return [0.0] * len(texts)
        return [float(s) for s in index.get_scores(known)]


_KEPT_VECTORS = 100_000


class HybridRetriever:
    """BM25 and an embedding model, joined by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    embed: texts -> one vector each, or an embedding model of LangChain or LlamaIndex. Vectors of chunks are kept.
    constant: the k of the fusion; larger flattens the difference between ranks.
    """

    comparable = False

    def __init__(self, embed: Callable[[list[str]], Any] | Any, constant: float = 60.0) -> None:
        self._documents, self._query = _embedders(embed)
        self._constant = constant
        self._words = BM25Retriever()
        self._vectors: dict[str, np.ndarray] = {}

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        if not chunks:
            return []
        texts = [chunk.heading + chunk.text for chunk in chunks]
        # Others may score meanwhile: what is kept is replaced, and never changed.
        kept = self._vectors
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        known = {**kept, **(dict(zip(new, _vectors(self._documents(new), len(new)), strict=True)) if new else {})}
        every = {**self._vectors, **known}
        self._vectors = every if len(every) <= _KEPT_VECTORS else {text: known[text] for text in texts}
        (asked,) = _vectors(self._query(question), 1)
        likeness = np.stack([known[text] for text in texts]) @ asked
        by_words = np.asarray(self._words.score(question, chunks))
        fused = 1 / (self._constant + _ranks(likeness))
        # A chunk without any word of the question has no rank among those that do.
        return [float(s) for s in fused + (by_words > 0) / (self._constant + _ranks(by_words))]


def _embedders(model: Any) -> tuple[Callable[[list[str]], Any], Callable[[str], Any]]:
    """How `model` embeds texts of documents, and a question."""
    if hasattr(model, "embed_documents"):
        return model.embed_documents, lambda text: [model.embed_query(text)]
    if hasattr(model, "get_text_embedding_batch"):
        return model.get_text_embedding_batch, lambda text: [model.get_query_embedding(text)]
    if callable(model):
        return model, lambda text: model([text])
    raise InputError(
        f"A {type(model).__name__} does not embed texts. Give a function from a list of texts to vectors, or an "
        "embedding model of LangChain or LlamaIndex."
    )


def _vectors(values: Any, count: int) -> np.ndarray:
    """As unit vectors, [count, dimensions]. Raises InputError."""
    try:
        vectors = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The embedding model did not give vectors: {error}. Give one list of numbers per text."
        ) from None
    if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        raise InputError(
            f"The embedding model gave an array of shape {vectors.shape} for {count} texts, or numbers that are not "
            "finite. Give one vector per text."
        )
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _ranks(scores: np.ndarray) -> np.ndarray:
    """1 for the highest."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks
