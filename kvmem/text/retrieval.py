"""Retrieval for corpora that do not fit the model's window."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import bm25s
import numpy as np

from kvmem.errors import InputError
from kvmem.text.document import Chunk

# bm25s sets its logger to DEBUG and would write to the application's log handlers.
logging.getLogger("bm25s").setLevel(logging.WARNING)

# Words, including single letters and digits; for scripts without spaces, single characters.
_TERM = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"


def _terms(texts: list[str]) -> list[list[str]]:
    terms: list[list[str]] = bm25s.tokenize(
        texts, token_pattern=_TERM, stopwords="en", return_ids=False, show_progress=False
    )
    return terms


class Retriever(Protocol):
    """The interface of a custom retriever.

    If its scores are comparable over the whole corpus, set the attribute `comparable = True`. The plan may then take
    whole documents, and chunks next to the best ones.

    Example:
        ```python
        class LongestFirst:
            def score(self, question, chunks):
                return [float(len(chunk.text)) for chunk in chunks]

        mem = KVMem("smollm2", store="./kv", retriever=LongestFirst())
        ```
    """

    def score(self, question: str, chunks: Sequence[Chunk]) -> Sequence[float]:
        """Score chunks for a question.

        Args:
            question: The question.
            chunks: The chunks, each with `text`, `heading`, `document_id`, `index` and `metadata`.

        Returns:
            One score per chunk, in the given order. Higher is better; 0 or less means irrelevant.
        """


class BM25Retriever:
    """BM25 retrieval (Robertson and Zaragoza, 2009), with bm25s. The index is kept as long as the chunks do not change.

    Attributes:
        comparable: True: scores are comparable over the whole corpus.

    Example:
        ```python
        from kvmem import BM25Retriever, KVMem

        mem = KVMem("smollm2", store="./kv", retriever=BM25Retriever())
        sources = mem.retrieve("When does the lease begin?", 4)
        ```
    """

    comparable = True

    def __init__(self) -> None:
        # Replaced as a whole, so that CPU threads can share a retriever.
        self._kept = _Indexed((), (), None)

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        """Return the BM25 score of each chunk; 0 for chunks without any word of the question."""
        if not chunks:
            return []
        kept = self._kept
        if not kept.has(chunks):
            kept = self._kept = kept.indexed(chunks)
        known = [] if kept.index is None else [t for t in _terms([question])[0] if t in kept.index.vocab_dict]
        if kept.index is None or not known:
            return [0.0] * len(chunks)
        scores: list[float] = kept.index.get_scores(known).tolist()
        return scores


@dataclass(frozen=True, eq=False)
class _Indexed:
    """Chunks and their BM25 index; None if they consist only of stop words. texts: those of the chunks."""

    chunks: tuple[Chunk, ...]
    texts: tuple[str, ...]
    index: bm25s.BM25 | None

    def has(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these are the same objects, which is known without looking at their texts."""
        return len(chunks) == len(self.chunks) and all(map(operator.is_, chunks, self.chunks))

    def indexed(self, chunks: Sequence[Chunk]) -> _Indexed:
        """An index of other chunks; the same one if their texts are equal."""
        texts = tuple(chunk.heading + chunk.text for chunk in chunks)
        if texts == self.texts:
            return _Indexed(tuple(chunks), texts, self.index)
        terms = _terms(list(texts))
        index = bm25s.BM25() if any(terms) else None
        if index is not None:
            index.index(terms, show_progress=False)
        return _Indexed(tuple(chunks), texts, index)


_KEPT_VECTORS = 100_000


class HybridRetriever:
    """BM25 and an embedding model, combined by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    Vectors of chunks are cached in memory.

    Args:
        embed: A function from a list of texts to one vector per text, or a LangChain or LlamaIndex embedding model.
        constant: The k of reciprocal rank fusion; a larger value reduces the difference between ranks.

    Attributes:
        comparable: False: scores depend on the other chunks.

    Raises:
        InputError: `embed` is neither a function nor an embedding model.

    Example:
        ```python
        from kvmem import HybridRetriever, KVMem

        mem = KVMem("smollm2", store="./kv", retriever=HybridRetriever(embeddings))
        sources = mem.retrieve("When does the lease begin?", 4)
        ```
    """

    comparable = False

    def __init__(self, embed: Callable[[list[str]], Any] | Any, constant: float = 60.0) -> None:
        self._documents, self._query = _embedders(embed)
        self._constant = constant
        self._words = BM25Retriever()
        self._vectors: dict[str, np.ndarray] = {}

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        """Return the fused score of each chunk. Raises InputError if the embedding model returns invalid vectors."""
        if not chunks:
            return []
        texts = [chunk.heading + chunk.text for chunk in chunks]
        # Other CPU threads may be scoring too, so the cache is replaced and never modified.
        kept = self._vectors
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        known = {
            **kept,
            **(dict(zip(new, as_unit_vectors(self._documents(new), len(new)), strict=True)) if new else {}),
        }
        every = {**self._vectors, **known}
        self._vectors = every if len(every) <= _KEPT_VECTORS else {text: known[text] for text in texts}
        (asked,) = as_unit_vectors(self._query(question), 1)
        likeness = np.stack([known[text] for text in texts]) @ asked
        return fuse(likeness, self._words.score(question, chunks), self._constant)


def fuse(likeness: Any, by_words: Any, constant: float = 60.0) -> list[float]:
    """Reciprocal rank fusion of similarities and BM25 scores, one each per chunk."""
    similar, worded = np.asarray(likeness), np.asarray(by_words)
    # A chunk without any word of the question gets no BM25 rank.
    fused = 1 / (constant + _ranks(similar)) + (worded > 0) / (constant + _ranks(worded))
    return [float(score) for score in fused]


def _embedders(model: Any) -> tuple[Callable[[list[str]], Any], Callable[[str], Any]]:
    """Functions that embed document texts and a question with `model`."""
    if hasattr(model, "embed_documents"):
        return model.embed_documents, lambda text: [model.embed_query(text)]
    if hasattr(model, "get_text_embedding_batch"):
        return model.get_text_embedding_batch, lambda text: [model.get_query_embedding(text)]
    if callable(model):
        return model, lambda text: model([text])
    raise InputError(
        f"{type(model).__name__} does not embed texts. Give a function from a list of texts to vectors, or a "
        "LangChain or LlamaIndex embedding model."
    )


def as_unit_vectors(values: Any, count: int) -> np.ndarray:
    """`values` as unit vectors, float32 [count, dimensions]. Raises InputError."""
    try:
        vectors = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The embedding model did not return vectors: {error}. It must return one list of numbers per text."
        ) from None
    if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        raise InputError(
            f"The embedding model returned an array of shape {vectors.shape} for {count} texts, or numbers that are "
            "not finite. It must return one vector per text, with finite numbers."
        )
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _ranks(scores: np.ndarray) -> np.ndarray:
    """The rank of each score; 1 is the highest score."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks
