"""Rotary position embedding (RoFormer, arXiv 2104.09864): moving keys to other positions.

Rotations compose, so a key read at position p stands at position p + d after one more rotation by d.
The scaling that YaRN applies to cos and sin is part of the stored key already and is not applied again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one kind of layer.

    inv_freq: [rotary_dim / 2], radians per token.
    pairing: "half" rotates dimension i with i + rotary_dim / 2 (Llama, Qwen, Gemma, GPT-NeoX);
        "interleaved" rotates 2i with 2i + 1 (GPT-J, Cohere, GLM).
    Dimensions from rotary_dim on are not rotated (partial rotary).
    """

    inv_freq: Tensor
    pairing: Pairing

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def turn(self, positions: Tensor) -> Turn:
        """The rotation of keys at `positions` (int64 [n])."""
        return self._turn(self._angles(positions))

    def move(self, old: Tensor, new: Tensor) -> Turn:
        """The rotation that takes keys from positions `old` to positions `new` (int64 [n] each)."""
        return self._turn(self._angles(new) - self._angles(old))

    def _angles(self, positions: Tensor) -> Tensor:
        # Models multiply in float32; far from 0 that rounding is larger than 1e-4 rad, and must be met, not mended.
        rounded = positions.to(torch.float32)[:, None] * self.inv_freq.to(positions.device, torch.float32)[None, :]
        return rounded.to(torch.float64)

    def _turn(self, angles: Tensor) -> Turn:
        return Turn(angles.cos().float(), angles.sin().float(), self.pairing)


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation that is ready to apply: cos and sin are float32 [n, rotary_dim / 2]."""

    cos: Tensor
    sin: Tensor
    pairing: Pairing

    def inverse(self) -> Turn:
        return Turn(self.cos, -self.sin, self.pairing)

    def apply(self, x: Tensor) -> Tensor:
        """`x` [..., n, dim] rotated, in float32; a new tensor."""
        half = self.cos.shape[-1]
        out = x.to(torch.float32, copy=True)
        if self.pairing == "half":
            first, second = out[..., :half], out[..., half : 2 * half]
        else:
            first, second = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
        turned_first = first * self.cos - second * self.sin
        turned_second = second * self.cos + first * self.sin
        first.copy_(turned_first)
        second.copy_(turned_second)
        return out
