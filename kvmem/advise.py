"""Estimate whether cached context or RAG is cheaper, from measured speeds and the expected workload."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvmem.blend.compose import Composer
from kvmem.kv.entry import Context
from kvmem.model.local import LanguageModel
from kvmem.prompt.span import Span
from kvmem.settings import BlendSettings
from kvmem.store.base import Store

_QUESTION = 40


@dataclass(frozen=True)
class Measured:
    """Measured speed of a model and a store on this machine.

    Attributes:
        linear: Seconds per token; prefilling n tokens takes linear * n + quadratic * n**2 seconds.
        quadratic: Seconds per token squared.
        load_bandwidth: Bytes of KV per second, from the store into the buffer.
        bytes_per_token: Bytes of KV per token.
        window: The model's context window, in tokens.
    """

    linear: float
    quadratic: float
    load_bandwidth: float
    bytes_per_token: int
    window: int

    def read(self, tokens: float, behind: float = 0.0) -> float:
        """Seconds to prefill `tokens` tokens after `behind` tokens."""
        return self.linear * tokens + self.quadratic * ((behind + tokens) ** 2 - behind**2)

    def load(self, tokens: float) -> float:
        """Seconds to load the KV of `tokens` tokens into the buffer."""
        return tokens * self.bytes_per_token / self.load_bandwidth


@dataclass(frozen=True)
class Wanted:
    """The expected workload.

    Attributes:
        corpus_tokens: Size of the corpus, in tokens.
        queries: Queries per day.
        updates: Updates per day.
        update_tokens: Tokens that one update changes.
        rag_tokens: Tokens that RAG retrieves per query.
        recompute: Fraction of the tokens that blending recomputes.
    """

    corpus_tokens: int
    queries: float
    updates: float = 0.0
    update_tokens: int = 600
    rag_tokens: int = 2000
    recompute: float = BlendSettings().share


@dataclass(frozen=True)
class Way:
    """The estimated cost of one way to answer.

    Attributes:
        name: Display name.
        first_token: Seconds to the first token, per query.
        once: Seconds of one-time work before the first query.
        per_day: Seconds of model time per day, without generating the answers.
        disk: Bytes on disk.
    """

    name: str
    first_token: float
    once: float
    per_day: float
    disk: int


@dataclass(frozen=True)
class Advice:
    """The result of `advise`.

    Attributes:
        ways: Ordinary RAG, kvmem with the same retrieval, and, if the corpus fits the window, kvmem with all of it.
        best: Name of the way with the least work per day.
        break_even: Number of queries after which the one-time work has paid off; None if it never does.
        reason: The recommendation in one sentence.
    """

    ways: tuple[Way, ...]
    best: str
    break_even: float | None
    reason: str


def advise(measured: Measured, wanted: Wanted) -> Advice:
    """Compare RAG with kvmem for the given workload. Runs no model."""
    question, corpus, rag = _QUESTION, wanted.corpus_tokens, min(wanted.rag_tokens, wanted.corpus_tokens)
    disk = corpus * measured.bytes_per_token
    update = measured.read(wanted.update_tokens)
    chunks = max(1, corpus // measured.window + 1)
    once = chunks * measured.read(corpus / chunks)
    plain = measured.read(rag + question)
    repair = measured.linear * wanted.recompute * rag + measured.quadratic * wanted.recompute * rag**2
    reused = measured.load(rag) + repair + 2 * measured.read(question, rag)
    ways = [
        Way("RAG", plain, 0.0, wanted.queries * plain, 0),
        Way("kvmem, retrieved chunks", reused, once, wanted.queries * reused + wanted.updates * update, disk),
    ]
    if corpus + question <= measured.window:
        # The first query after an update needs blending; after that the corpus is exact and stays in memory.
        exact = measured.read(question, corpus)
        blended = measured.load(corpus) + exact + wanted.recompute * measured.read(corpus)
        share = min(1.0, wanted.updates / max(wanted.queries, 1e-9))
        typical = (1 - share) * exact + share * blended
        ways.append(Way("kvmem, whole corpus", typical, once, wanted.queries * typical + wanted.updates * update, disk))
    best = min(ways, key=lambda way: way.per_day)
    ours = min(ways[1:], key=lambda way: way.per_day)
    saved = (ways[0].per_day - ours.per_day) / max(wanted.queries, 1e-9)
    break_even = once / saved if saved > 0 else None
    return Advice(tuple(ways), best.name, break_even, _reason(ways, best, break_even, wanted))


def _reason(ways: Sequence[Way], best: Way, break_even: float | None, wanted: Wanted) -> str:
    whole = "" if len(ways) == 3 else "; the corpus does not fit the window, so both options retrieve chunks"
    if best.name == "RAG" or break_even is None:
        return (
            f"RAG needs less work: {wanted.updates:.0f} updates a day cost more than {wanted.queries:.0f} queries "
            f"save{whole}"
        )
    days = break_even / max(wanted.queries, 1e-9)
    return f"{best.name} pays back its one-time prefill after {break_even:.0f} queries ({days:.1f} days){whole}"


def measure(model: LanguageModel, store: Store) -> Measured:
    """Time prefill and loading on this machine. Takes a few seconds and leaves nothing in the store."""
    rng = np.random.default_rng(0)
    sizes = [size for size in (256, 512, 1024, 2048) if size <= model.window // 2] or [model.window // 2]
    vocabulary = int(model.hf.config.get_text_config().vocab_size)
    ids = tuple(int(i) for i in rng.integers(5, vocabulary - 5, max(sizes)))
    model.append(ids[: sizes[0]], model.new_cache(sizes[0]))  # warm-up: the first run is slower
    seconds = []
    for size in sizes:
        cache = model.new_cache(size)
        began = time.perf_counter()
        model.append(ids[:size], cache)
        _wait(model)
        seconds.append(time.perf_counter() - began)
    terms = np.array([[size, size**2] for size in sizes], dtype=float)
    linear, quadratic = _fit(terms, np.array(seconds))
    span = Span(ids)
    composer = Composer(model, store, "kvmem-advise", span)
    key = composer.key(Context(), span)
    store.put(cache.entry(key, ids, 0, ()))
    target = model.new_cache(len(ids))
    try:
        began = time.perf_counter()
        entry = store.get(key)
        if entry is not None:
            target.load(entry, 0)
        _wait(model)
        took = time.perf_counter() - began
    finally:
        store.clear("kvmem-advise")
    size = len(ids) * model.bytes_per_token
    return Measured(linear, quadratic, size / took, model.bytes_per_token, model.window)


def _fit(terms: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Least-squares fit that minimises relative errors; costs are never negative."""
    weights = 1 / seconds[:, None]
    (linear, quadratic), *_ = np.linalg.lstsq(terms * weights, np.ones(len(seconds)), rcond=None)
    if quadratic < 0:
        return float(np.mean(seconds / terms[:, 0])), 0.0
    return max(float(linear), 0.0), float(quadratic)


def _wait(model: LanguageModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
