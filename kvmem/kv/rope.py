"""Rotary position embedding (RoFormer, arXiv 2104.09864): move keys to other positions.

Rotations compose, so rotating a key computed at position p by d gives the key for position p + d. YaRN's scaling of cos
and sin is already part of the stored key and is not applied again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one type of layer. Dimensions from `rotary_dim` on are not rotated (partial rotary).

    Attributes:
        inv_freq: [rotary_dim / 2], in radians per token.
        pairing: "half" rotates dimension i with i + rotary_dim / 2 (Llama, Qwen, Gemma, GPT-NeoX);
            "interleaved" rotates 2i with 2i + 1 (GPT-J, Cohere, GLM).
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
        # Models multiply in float32. Far from 0, the rounding error exceeds 1e-4 rad, so it must be reproduced here.
        rounded = positions.to(torch.float32)[:, None] * self.inv_freq.to(positions.device, torch.float32)[None, :]
        return rounded.to(torch.float64)

    def _turn(self, angles: Tensor) -> Turn:
        return Turn(angles.cos().float(), angles.sin().float(), self.pairing)


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation that is ready to apply: cos and sin are [n, rotary_dim / 2], float32 unless cast."""

    cos: Tensor
    sin: Tensor
    pairing: Pairing

    def inverse(self) -> Turn:
        return Turn(self.cos, -self.sin, self.pairing)

    def to(self, dtype: torch.dtype) -> Turn:
        """The same rotation in another precision, for `add_to`."""
        return Turn(self.cos.to(dtype), self.sin.to(dtype), self.pairing)

    def apply(self, x: Tensor) -> Tensor:
        """`x` ([..., n, dim]) rotated, as a new float32 tensor."""
        out = x.to(torch.float32, copy=True)
        first, second = self._halves(out)
        turned = (first * self.cos).addcmul_(second, self.sin, value=-1)
        second.mul_(self.cos).addcmul_(first, self.sin)
        first.copy_(turned)
        return out

    def add_to(self, target: Tensor, x: Tensor) -> None:
        """Add the rotated `x` to `target`, in place. Both are [..., n, dim], in the rotation's dtype."""
        first, second = self._halves(x)
        onto_first, onto_second = self._halves(target)
        onto_first.addcmul_(first, self.cos).addcmul_(second, self.sin, value=-1)
        onto_second.addcmul_(second, self.cos).addcmul_(first, self.sin)
        rotated = 2 * self.cos.shape[-1]
        target[..., rotated:] += x[..., rotated:]

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two halves of `x` that are rotated with each other."""
        half = self.cos.shape[-1]
        if self.pairing == "half":
            return x[..., :half], x[..., half : 2 * half]
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
