"""The local correction: moves tokens that are not recomputed along with the recomputed tokens near them.

The KV of a chunk changes when other text stands before it, and this change varies smoothly with position. The
recomputed tokens are exact samples of it; their neighbours are moved by a kernel-weighted mean of the samples, which
shrinks towards zero with the distance from any sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvmem.kv.layer import BlendedLayer
from kvmem.kv.rope import Rope, Turn
from kvmem.settings import BlendSettings

_NEGLIGIBLE = 0.02
# Shapes are rounded up to multiples of these, because the CPU library generates code for every new shape.
_ROWS, _SAMPLES = 64, 16


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows [start, end), and the samples from index `first` on that move them.

    weights: [rows, samples], zero-padded in both dimensions to multiples of `_ROWS` and `_SAMPLES`.
    """

    start: int
    end: int
    first: int
    weights: Tensor


class LocalCorrection:
    """The correction for one forward pass.

    Args:
        selected: int64 [s], the recomputed positions, ascending; they are the first s rows of the pass.
        segments: The range [start, end) of every approximate chunk, ascending.
        settings: The blend settings.
        dtype: The model's dtype; the correction is computed in it.
    """

    def __init__(
        self, selected: Tensor, segments: Sequence[tuple[int, int]], settings: BlendSettings, dtype: torch.dtype
    ) -> None:
        self._selected = selected
        self._dtype = dtype
        self._blocks = [
            block for start, end in segments if (block := _weigh(selected, start, end, settings, dtype)) is not None
        ]
        self._turns: dict[int, tuple[Turn, list[Turn]]] = {}

    def apply(self, layer: BlendedLayer, new_keys: Tensor, new_values: Tensor) -> None:
        """Move the rows between the samples. Layer 0 depends only on the tokens and needs no correction."""
        if layer.index == 0 or not self._blocks:
            return
        count = self._selected.numel()
        moved_keys = new_keys[0, :, :count].float() - layer.keys[0].index_select(1, self._selected).float()
        moved_values = new_values[0, :, :count].float() - layer.values[0].index_select(1, self._selected).float()
        turns = self._rotations(layer.group.rope)
        if turns is not None:
            moved_keys = turns[0].apply(moved_keys)
        group = layer.group
        # One row per sample with all heads side by side, so that each chunk needs a single matrix product.
        moved = torch.cat([moved_keys, moved_values], dim=-1).to(layer.dtype).transpose(0, 1).reshape(count, -1)
        moved = F.pad(moved, (0, 0, 0, _SAMPLES))
        for number, block in enumerate(self._blocks):
            # One chunk at a time keeps the added values in the CPU cache.
            rows = block.weights.mm(moved[block.first : block.first + block.weights.shape[1]])
            rows = rows[: block.end - block.start]
            added = rows.view(-1, group.kv_heads, group.key_dim + group.value_dim).transpose(0, 1)
            keys = layer.keys[0, :, block.start : block.end]
            if turns is None:
                keys += added[..., : group.key_dim]
            else:
                turns[1][number].add_to(keys, added[..., : group.key_dim])
            layer.values[0, :, block.start : block.end] += added[..., group.key_dim :]

    def _rotations(self, rope: Rope | None) -> tuple[Turn, list[Turn]] | None:
        """The inverse rotation at the samples, and the rotation of each block. RoPE is linear."""
        if rope is None:
            return None
        if id(rope) not in self._turns:
            device = self._selected.device
            rows = [torch.arange(block.start, block.end, device=device) for block in self._blocks]
            forward = [rope.turn(positions).to(self._dtype) for positions in rows]
            self._turns[id(rope)] = rope.turn(self._selected).inverse(), forward
        return self._turns[id(rope)]


def _weigh(selected: Tensor, start: int, end: int, settings: BlendSettings, dtype: torch.dtype) -> _Block | None:
    """The weights of one chunk's rows, or None if the chunk has no samples."""
    bounds = torch.tensor([start, end], device=selected.device)
    first, last = (int(i) for i in torch.searchsorted(selected, bounds))
    if first == last:
        return None
    samples = selected[first:last]
    rows = torch.arange(start, end, device=selected.device)
    kernel = torch.exp(-(rows[:, None] - samples[None, :]).abs().float() / settings.reach)
    weights = kernel / (kernel.sum(dim=1, keepdim=True) + settings.shrinkage)
    weights[weights.sum(dim=1) <= _NEGLIGIBLE] = 0.0
    weights[samples - start] = 0.0
    spare = (-weights.shape[1] % _SAMPLES, -weights.shape[0] % _ROWS)
    return _Block(start, end, first, F.pad(weights, (0, spare[0], 0, spare[1])).to(dtype))
