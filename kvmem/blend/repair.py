"""Blending: recompute the few important tokens of a composed buffer and prefill the question, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmem.blend.correction import LocalCorrection
from kvmem.blend.select import Candidates, select
from kvmem.blend.stitched import Stitched
from kvmem.kv.attention import Enough, Step
from kvmem.kv.buffer import BlendedCache
from kvmem.kv.layer import BlendedLayer
from kvmem.model.local import LanguageModel
from kvmem.results import Usage
from kvmem.settings import BlendSettings


@dataclass(frozen=True, eq=False)
class Repair:
    """A forward pass that is ready to run: it recomputes the chosen tokens and prefills the query after them.

    Attributes:
        token_ids: int64 [m], the chosen tokens and the query.
        step: Their positions; None if the model cannot be blended, in which case only the query is prefilled.
        correction: Corrects the neighbours of the recomputed tokens; None if there is nothing to correct.
        recomputed: int64, the chosen positions, ascending.
        end: The length of the cache afterwards.
        token_layers: Work that choosing the tokens took, in tokens x layers.
    """

    token_ids: Tensor
    step: Step | None
    correction: LocalCorrection | None
    recomputed: Tensor
    end: int
    token_layers: int

    def run(self, model: LanguageModel, cache: BlendedCache) -> Tensor:
        """Run the forward pass over `cache`, in place; returns the logits after the last token, float32 [vocab]."""
        if self.step is None:
            return model.next_logits(self.token_ids, cache)
        logits = model.next_logits(self.token_ids, cache, self.step, self.correction)
        cache.length = self.end
        return logits

    def as_first_forward(self, model: LanguageModel, cache: BlendedCache) -> AbstractContextManager[None]:
        """While the context is open, the model's next forward pass is replaced by this one."""
        if self.step is None:
            return nullcontext()
        return model.first_forward(self.token_ids, cache, self.step, self.correction)


def plan_repair(model: LanguageModel, stitched: Stitched, query: Sequence[int], settings: BlendSettings) -> Repair:
    """Choose the tokens of `stitched` to recompute, and reserve room for `query` (at least one token) in its buffer."""
    query = query[stitched.known :]
    cache, start = stitched.cache, stitched.cache.length
    end = start + len(query)
    cache.reserve(end)
    query_positions = torch.arange(start, end, device=model.device)
    query_ids = torch.tensor(query, dtype=torch.long)
    if not model.blendable:
        return Repair(query_ids, None, None, query_positions[:0], end, 0)
    observer = _Observer(model, stitched, query_ids, query_positions)
    candidates = Candidates(stitched.segments, observer.attention, observer.deviation, model.device)
    selected, correction = _choose(candidates, settings, model)
    chunk_ids = torch.tensor(stitched.token_ids, dtype=torch.long)
    token_ids = torch.cat([chunk_ids[selected.cpu()], query_ids])
    step = model.step(torch.cat([selected, query_positions]))
    return Repair(token_ids, step, correction, selected, end, observer.token_layers)


def plan_shared_repair(
    model: LanguageModel, stitched: Stitched, queries: Sequence[Sequence[int]], settings: BlendSettings
) -> Repair:
    """Choose the tokens of `stitched` to recompute for several queries, by their average attention.

    The queries are not prefilled. The model must be blendable.
    """
    start = stitched.cache.length
    stitched.cache.reserve(start + max(map(len, queries)))
    observers = [
        _Observer(
            model,
            stitched,
            torch.tensor(query, dtype=torch.long),
            torch.arange(start, start + len(query), device=model.device),
        )
        for query in queries
    ]

    def attention() -> Tensor:
        return torch.stack([observer.attention()[:start] for observer in observers]).mean(dim=0)

    candidates = Candidates(stitched.segments, attention, observers[0].deviation, model.device)
    selected, correction = _choose(candidates, settings, model)
    chunk_ids = torch.tensor(stitched.token_ids, dtype=torch.long)
    step = model.step(selected) if selected.numel() else None
    work = sum(observer.token_layers for observer in observers)
    return Repair(chunk_ids[selected.cpu()], step, correction, selected, start, work)


def _choose(
    candidates: Candidates, settings: BlendSettings, model: LanguageModel
) -> tuple[Tensor, LocalCorrection | None]:
    """The positions to recompute, and the correction for their neighbours."""
    selected = select(candidates, settings)
    if not settings.corrects or not selected.numel():
        return selected, None
    return selected, LocalCorrection(selected, candidates.segments, settings, model.dtype)


class _Deviation:
    """A stand-in for a correction that measures how far layer 1 is from exact and ends the forward pass there."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self.squared = torch.empty(0)

    def apply(self, layer: BlendedLayer, new_keys: Tensor, new_values: Tensor) -> None:
        if layer.index < 1:
            return
        old = layer.values[0][:, self._positions].float()
        self.squared = (new_values[0].float() - old).square().sum(dim=(0, 2))
        raise Enough


class _Observer:
    """Measures what the selectors need, and counts the work in tokens x layers."""

    def __init__(self, model: LanguageModel, stitched: Stitched, query_ids: Tensor, query_positions: Tensor) -> None:
        self._model, self._stitched = model, stitched
        self._query_ids, self._query_positions = query_ids, query_positions
        self.token_layers = 0

    def attention(self) -> Tensor:
        """The question's attention to every position, averaged over heads and question tokens, summed over layers.

        Scores every second full-attention layer in the model's middle third. If there is none, it scores the middle
        third of the full-attention layers, or of all layers.
        """
        depth = self._model.depth
        full = sorted(i for g in self._model.anatomy.groups if g.window is None for i in g.layers)
        layers = full or list(range(depth))
        middle = [i for i in layers if depth <= 3 * i < 2 * depth] or _middle_third(layers)
        scored = frozenset(middle[::2])
        total = int(self._query_positions[-1]) + 1
        scores = torch.zeros(total, device=self._model.device)
        step = Step(self._query_positions, self._model.settings.attention, scored, scores, partial=True)
        with suppress(Enough):
            self._model.forward(self._query_ids, self._stitched.cache, step)
        self.token_layers += step.token_layers
        return scores

    def deviation(self) -> Tensor:
        """The squared distance of layer 1's values from exact ones, for every approximate token."""
        stitched = self._stitched
        ranges = [torch.arange(a, b, device=self._model.device) for a, b in stitched.segments]
        positions = torch.cat(ranges)
        token_ids = torch.tensor(stitched.token_ids, dtype=torch.long)[positions.cpu()]
        measure = _Deviation(positions)
        step = Step(positions, self._model.settings.attention)
        # This also writes layer 0, but its rows depend only on token and position, so they do not change.
        with suppress(Enough):
            self._model.forward(token_ids, stitched.cache, step, measure)
        self.token_layers += step.token_layers
        return measure.squared


def _middle_third(layers: Sequence[int]) -> Sequence[int]:
    return layers[len(layers) // 3 : -(-2 * len(layers) // 3)]


def count_usage(
    model: LanguageModel, stitched: Stitched, repair: Repair, generated: int, query: int | None = None
) -> Usage:
    """Count the tokens of each class. `query`: the number of query tokens, if `repair` did not prefill the query."""
    recomputed = set(repair.recomputed.tolist())
    own = 0 if query is None else query
    query = len(repair.token_ids) - len(recomputed) if query is None else query
    counts = {"exact": 0, "computed": query, "reused": 0}
    for item in stitched.placed:
        counts[item.origin] += sum(1 for p in range(item.start + item.known, item.end) if p not in recomputed)
        counts["exact"] += item.known
    read = stitched.forwarded + len(repair.token_ids) + own
    return Usage(
        exact=counts["exact"] + stitched.known,
        reused=counts["reused"],
        recomputed=len(recomputed),
        computed=counts["computed"],
        generated=generated,
        token_layers=read * model.depth + repair.token_layers,
    )
