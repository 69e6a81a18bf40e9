"""Repair: recompute the few tokens of a stitched cache that matter, and read the question, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmem.answer import Usage
from kvmem.attention import Step
from kvmem.cache import BlendedLayer
from kvmem.compose import Stitched
from kvmem.correct import LocalCorrection
from kvmem.model import LanguageModel
from kvmem.select import Candidates, select
from kvmem.settings import BlendSettings


@dataclass(frozen=True, eq=False)
class Repaired:
    """logits: float32 [vocab] after the last token read, if asked for. recomputed: positions, int64 ascending.

    forwarded: tokens that went through the model.
    """

    logits: Tensor | None
    recomputed: Tensor
    forwarded: int


def repair(
    model: LanguageModel,
    stitched: Stitched,
    query: Sequence[int],
    settings: BlendSettings,
    *,
    logits: bool,
) -> Repaired:
    """Choose and recompute tokens of `stitched` and read `query` behind it, in place.

    Afterwards the cache holds chunks and query. `query` may be empty, unless logits are asked for.
    """
    cache, end = stitched.cache, stitched.cache.length
    cache.reserve(end + len(query))
    query_positions = torch.arange(end, end + len(query), device=model.device)
    query_ids = torch.tensor(query, dtype=torch.long)
    if not stitched.segments:
        result = model.append(query, cache, logits=logits) if query else None
        return Repaired(result, query_positions[:0], len(query))
    observer = _Observer(model, stitched, query_ids, query_positions)
    candidates = Candidates(stitched.segments, observer.attention, observer.deviation, model.device)
    selected = select(candidates, settings)
    correction = None
    if settings.corrects and selected.numel():
        correction = LocalCorrection(selected, stitched.segments, settings)
    positions = torch.cat([selected, query_positions])
    chunk_ids = torch.tensor(stitched.token_ids, dtype=torch.long)
    token_ids = torch.cat([chunk_ids[selected.cpu()], query_ids])
    result = None
    if positions.numel():
        step = Step(positions, model.settings.attention)
        result = model.forward(token_ids, cache, step, correction, logits=logits)
    cache.length = end + len(query)
    return Repaired(result, selected, positions.numel() + observer.forwarded)


class _EnoughError(Exception):
    """Ends a forward once what it was run for is known."""


class _Deviation:
    """Stands in for a correction: measures how far layer 1 is from exact, and ends the forward there."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self.squared = torch.empty(0)

    def apply(self, layer: BlendedLayer, new_keys: Tensor, new_values: Tensor) -> None:
        if layer.index < 1:
            return
        old = layer.values[0][:, self._positions].float()
        self.squared = (new_values[0].float() - old).square().sum(dim=(0, 2))
        raise _EnoughError


class _Observer:
    """Measures what selectors ask for, and counts the tokens it forwards."""

    def __init__(self, model: LanguageModel, stitched: Stitched, query_ids: Tensor, query_positions: Tensor) -> None:
        self._model, self._stitched = model, stitched
        self._query_ids, self._query_positions = query_ids, query_positions
        self.forwarded = 0

    def attention(self) -> Tensor:
        """The question's attention to every position, averaged over heads, its own tokens, and the full-attention
        layers in the later half of the model (the later half of those there are, or of all, where there is none)."""
        depth = sum(len(g.layers) for g in self._model.anatomy.groups)
        full = sorted(i for g in self._model.anatomy.groups if g.window is None for i in g.layers)
        layers = full or list(range(depth))
        scored = frozenset([i for i in layers if i >= depth // 2] or layers[len(layers) // 2 :])
        total = int(self._query_positions[-1]) + 1
        scores = torch.zeros(total, device=self._model.device)
        step = Step(self._query_positions, self._model.settings.attention, scored, scores)
        self._model.forward(self._query_ids, self._stitched.cache, step)
        self.forwarded += len(self._query_ids)
        return scores

    def deviation(self) -> Tensor:
        """Squared distance of layer 1's values from exact, for every approximate token."""
        stitched = self._stitched
        ranges = [torch.arange(a, b, device=self._model.device) for a, b in stitched.segments]
        positions = torch.cat(ranges)
        token_ids = torch.tensor(stitched.token_ids, dtype=torch.long)[positions.cpu()]
        measure = _Deviation(positions)
        step = Step(positions, self._model.settings.attention)
        # Layer 0 is written on the way; its rows depend on token and position only, so they stay what they were.
        with suppress(_EnoughError):
            self._model.forward(token_ids, stitched.cache, step, measure)
        self.forwarded += len(token_ids)
        return measure.squared


def count_usage(stitched: Stitched, repaired: Repaired, query: int, generated: int) -> Usage:
    """Tokens by what was done for them; `query` and `generated` are numbers of tokens."""
    recomputed = set(repaired.recomputed.tolist())
    counts = {"exact": 0, "computed": query, "reused": 0}
    for item in stitched.placed:
        counts[item.origin] += sum(1 for p in range(item.start, item.end) if p not in recomputed)
    return Usage(
        exact=counts["exact"],
        reused=counts["reused"],
        recomputed=len(recomputed),
        computed=counts["computed"],
        generated=generated,
        forwarded=stitched.forwarded + repaired.forwarded + (query - _read(repaired, query)),
    )


def _read(repaired: Repaired, query: int) -> int:
    """How many of the query's tokens the repair read; generation reads the last one."""
    return query if repaired.logits is not None else query - 1
