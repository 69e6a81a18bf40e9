"""Attention over a buffer in which any subset of positions is being computed.

The function is registered with transformers' attention interface, so an unmodified model runs it. Its mask
comes from positions alone: key_position <= query_position, and inside the window on sliding layers. It never
relies on `is_causal` for a subset, which aligns to a corner and lets early tokens see later ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from kvmem.settings import AttentionName

ATTENTION = "kvmem"
ROWS_PER_BLOCK = 128
# Masks are shared by the layers of a step unless they would take more than this many bytes.
MASK_BYTES = 64 << 20


@dataclass(eq=False)
class Step:
    """One forward over a `BlendedCache`: which positions are computed, and what is observed on the way.

    positions: int64 [m], strictly ascending.
    scored_layers: the layers whose attention is observed.
    scores: float32 [total]; each scored layer adds its attention to every key position, averaged over heads
        and over the m rows.
    """

    positions: Tensor
    backend: AttentionName = "sdpa"
    scored_layers: frozenset[int] = frozenset()
    scores: Tensor | None = None
    layers_seen: int = 0
    _blocks: dict[int | None, list[Block]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = int(self.positions[0])
        self.end = int(self.positions[-1]) + 1
        self.contiguous = self.end - self.start == self.positions.numel()

    def blocks(self, window: int | None) -> list[Block]:
        """The rows in blocks, each with the range of keys it can see."""
        if window not in self._blocks:
            self._blocks[window] = self._cut(window)
        return self._blocks[window]

    def _cut(self, window: int | None) -> list[Block]:
        host = self.positions.tolist()
        blocks = []
        for first in range(0, len(host), ROWS_PER_BLOCK):
            last = min(first + ROWS_PER_BLOCK, len(host))
            low = 0 if window is None else max(0, host[first] - window + 1)
            blocks.append(Block(first, last, low, host[last - 1] + 1))
        if sum((b.last - b.first) * (b.high - b.low) for b in blocks) <= MASK_BYTES:
            for block in blocks:
                mask = block.make_mask(self.positions, window)
                # The CPU kernel would turn a bool mask into an additive one in every layer.
                block.mask = _additive(mask) if self.backend == "sdpa" and mask.device.type == "cpu" else mask
        return blocks


def _additive(mask: Tensor) -> Tensor:
    """float32: 0 where the row may attend, else -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


@dataclass(eq=False)
class Block:
    """Rows [first, last) of a step and the keys [low, high) that any of them can see."""

    first: int
    last: int
    low: int
    high: int
    mask: Tensor | None = None  # bool, or float32 to be added

    def make_mask(self, positions: Tensor, window: int | None) -> Tensor:
        """bool [rows, keys], True where the row may attend."""
        rows = positions[self.first : self.last, None]
        keys = torch.arange(self.low, self.high, device=positions.device)[None, :]
        mask = keys <= rows
        return mask if window is None else mask & (keys > rows - window)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kvmem_step: Step | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: query [1, heads, m, d], key/value [1, kv heads, total, d]."""
    if kvmem_step is None or position_bias is not None:
        raise ValueError("this attention needs kvmem's positions and knows no position bias")
    step = kvmem_step
    step.layers_seen += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    observed = int(module.layer_idx) in step.scored_layers  # type: ignore[arg-type]
    reference = step.backend == "eager" or softcap is not None or s_aux is not None
    causal = step.contiguous and step.start == 0 and (sliding_window is None or step.end <= sliding_window)
    if causal and not observed and not reference:
        return _fast(query, key, value, None, scale, True), None
    pieces = []
    for block in step.blocks(sliding_window):
        rows = query[:, :, block.first : block.last]
        keys, values = key[:, :, block.low : block.high], value[:, :, block.low : block.high]
        mask = block.mask if block.mask is not None else block.make_mask(step.positions, sliding_window)
        if observed or reference:
            out, weights = _explicit(rows, keys, values, mask, scale, softcap, s_aux)
            if observed and step.scores is not None:
                heads = weights.shape[0] * weights.shape[1]
                share = weights.sum(dim=(0, 1, 2)) / (heads * step.positions.numel())
                step.scores[block.low : block.high] += share
            pieces.append(out)
        else:
            pieces.append(_fast(rows, keys, values, mask, scale, False))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)), None


def _fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """SDPA without repeating the kv heads; returns [1, m, heads, d]."""
    batch, heads, m, dim = q.shape
    groups = heads // k.shape[1]
    if groups > 1 and q.device.type != "cpu" and not causal:
        # CUDA's fused kernels take a mask only without enable_gqa: put the heads of a group side by side.
        packed = q.reshape(batch, k.shape[1], groups * m, dim)
        tiled = None if mask is None else mask.repeat(groups, 1)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=tiled, scale=scale)
        out = out.reshape(batch, heads, m, v.shape[-1])
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    return out.transpose(1, 2).contiguous()


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention with its weights: ([1, m, heads, d], float32 weights [kv heads, group, m, keys])."""
    _, heads, m, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    logits = (q.reshape(kv_heads, groups * m, dim) @ k[0].transpose(1, 2)).float()
    logits = logits.mul_(scale).reshape(kv_heads, groups, m, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else logits.add_(mask)
    if sinks is not None:
        column = sinks.float().reshape(kv_heads, groups, 1, 1).expand(-1, -1, m, 1)
        weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    out = weights.to(v.dtype).reshape(kv_heads, groups * m, -1) @ v[0]
    return out.reshape(1, heads, m, -1).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION, attend)
