"""Select the tokens of a composed buffer to recompute.

Each selector is a function of the candidates, a budget and the settings. It returns `budget` positions, except for
"none" and "all", and for "query", which takes a few tokens of every chunk, however short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmem.settings import BlendSettings, SelectorName


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens a selector chooses from.

    Attributes:
        segments: The range [start, end) of every approximate chunk, ascending.
        attention: () -> float32 [at least the end of the last segment], the question's attention to every position.
        deviation: () -> float32 [number of candidates], how far the KV of layer 1 is from exact.
        device: Device of the returned positions.
    """

    segments: tuple[tuple[int, int], ...]
    attention: Callable[[], Tensor]
    deviation: Callable[[], Tensor]
    device: torch.device

    @property
    def count(self) -> int:
        return sum(end - start for start, end in self.segments)

    @property
    def positions(self) -> Tensor:
        """int64 [count], ascending."""
        ranges = [torch.arange(start, end, device=self.device) for start, end in self.segments]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long, device=self.device)


# "query" recomputes at least this many tokens of a chunk, or all of it.
_LEAST = 4
Selector = Callable[[Candidates, int, BlendSettings], Tensor]


def select(candidates: Candidates, settings: BlendSettings) -> Tensor:
    """The positions to recompute, int64, ascending."""
    budget = int(settings.share * candidates.count)
    if not candidates.count:
        return candidates.positions
    return SELECTORS[settings.selector](candidates, budget, settings).sort().values


def _query(candidates: Candidates, budget: int, settings: BlendSettings) -> Tensor:
    """The tokens that the question attends to most; each chunk gets a share of the budget in proportion to its size.

    There is no single ranking over all chunks, because attention favours text close to the question, and a chunk
    without recomputed tokens cannot be corrected.
    """
    positions = candidates.positions
    if settings.share == 0 or budget == candidates.count:
        return positions[:budget]
    scores = candidates.attention()
    sizes = [end - start for start, end in candidates.segments]
    shares = [max(share, min(_LEAST, size)) for share, size in zip(_shares(sizes, budget), sizes, strict=True)]
    chosen = [
        start + scores[start:end].topk(share).indices
        for (start, end), share in zip(candidates.segments, shares, strict=True)
    ]
    return torch.cat(chosen)


def _shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Split `budget` in proportion to `sizes`, in whole numbers, by the largest-remainder method."""
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for index in by_remainder[: budget - sum(shares)]:
        shares[index] += 1
    return shares


def _deviation(candidates: Candidates, budget: int, settings: BlendSettings) -> Tensor:
    """CacheBlend (EuroSys'25): the tokens whose KV at layer 1 differs most from exact."""
    positions = candidates.positions
    return positions[candidates.deviation().topk(budget).indices] if budget else positions[:0]


def _first_k(candidates: Candidates, budget: int, settings: BlendSettings) -> Tensor:
    """EPIC (ICML'25): the first tokens of every chunk, as many in each as the budget allows."""
    longest = max(end - start for start, end in candidates.segments)
    taken: list[Tensor] = []
    for offset in range(longest):
        for start, end in candidates.segments:
            if start + offset < end and len(taken) < budget:
                taken.append(torch.tensor(start + offset, device=candidates.device))
    return torch.stack(taken) if taken else candidates.positions[:0]


def _none(candidates: Candidates, budget: int, settings: BlendSettings) -> Tensor:
    """Reuse without blending."""
    return candidates.positions[:0]


def _all(candidates: Candidates, budget: int, settings: BlendSettings) -> Tensor:
    """Recompute everything; equals full prefill."""
    return candidates.positions


SELECTORS: dict[SelectorName, Selector] = {
    "query": _query,
    "deviation": _deviation,
    "first_k": _first_k,
    "none": _none,
    "all": _all,
}
