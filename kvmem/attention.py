"""Attention over a buffer in which any subset of positions is being computed.

The function is registered with transformers' attention interface, so an unmodified model runs it. Its mask
comes from positions alone: key_position <= query_position, and inside the window on sliding layers. It never
relies on `is_causal` for a subset, which aligns to a corner and lets early tokens see later ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvmem.settings import AttentionName

ATTENTION = "kvmem"
DECODING = "kvmem_decoding"
ROWS_PER_BLOCK = 96
# Masks are shared by the layers of a step unless they would cover more than this many pairs.
MASK_PAIRS = 16 << 20
# From so many keys on that all rows of a block see, they are attended to without a mask.
SPLIT_FROM = 256


@dataclass(eq=False)
class Step:
    """One forward over a `BlendedCache`: which positions are computed, and what is observed on the way.

    positions: int64 [m], strictly ascending.
    scored_layers: the layers whose attention is observed.
    scores: float32 [total]; each scored layer adds its attention to every key position, averaged over heads
        and over the m rows.
    final_layer: the model's last one, if of its output only the last token's is wanted; the other rows need no
        attention there, since their keys and values do not depend on it.
    partial: the forward is for the scores only, and ends (with `Enough`) in the last scored layer.
    layers_entered, layers_seen: how many layers have computed keys, and how many have attended, so far.
    """

    positions: Tensor
    backend: AttentionName = "sdpa"
    scored_layers: frozenset[int] = frozenset()
    scores: Tensor | None = None
    final_layer: int | None = None
    partial: bool = False
    layers_entered: int = 0
    layers_seen: int = 0
    _blocks: dict[int | None, list[Block]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = int(self.positions[0])
        self.end = int(self.positions[-1]) + 1
        self.contiguous = self.end - self.start == self.positions.numel()

    @property
    def token_layers(self) -> int:
        """Tokens x layers computed so far."""
        return self.positions.numel() * self.layers_entered

    def blocks(self, window: int | None) -> list[Block]:
        """The rows in blocks, each with the range of keys it can see."""
        if window not in self._blocks:
            self._blocks[window] = self._cut(window)
        return self._blocks[window]

    def _cut(self, window: int | None) -> list[Block]:
        host = self.positions.tolist()
        count = math.ceil(len(host) / ROWS_PER_BLOCK)
        edges = [len(host) * i // count for i in range(count + 1)]
        blocks = []
        for first, last in pairwise(edges):
            low = 0 if window is None else max(0, host[first] - window + 1)
            edge = host[first] if window is None else low
            blocks.append(Block(self.positions[first:last], first, last, low, edge, host[last - 1] + 1, window))
        keep = sum((b.last - b.first) * (b.high - b.edge) for b in blocks) <= MASK_PAIRS
        for block in blocks:
            block.kept = keep
        return blocks


class Enough(Exception):  # noqa: N818
    """Ends a forward whose remaining layers nobody needs."""


@dataclass(eq=False)
class Block:
    """Rows [first, last) of a step, at `positions`, and the keys [low, high) that any of them can see.

    Keys [low, edge) are seen by every row; masks are for [edge, high) and, if `kept`, made once.
    """

    positions: Tensor
    first: int
    last: int
    low: int
    edge: int
    high: int
    window: int | None
    kept: bool = False
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self) -> Tensor:
        """bool [rows, high - edge], True where the row may attend."""
        keys = torch.arange(self.edge, self.high, device=self.positions.device)[None, :]
        mask = keys <= self.positions[:, None]
        return mask if self.window is None else mask & (keys > self.positions[:, None] - self.window)

    def added_mask(self, groups: int, start: int, dtype: torch.dtype) -> Tensor:
        """[groups * rows, high - start]: 0 where the row may attend, else -inf; the kernels would make it in every
        layer."""
        name = groups, start, dtype
        if name in self._masks:
            return self._masks[name]
        hidden = ~self.mask()
        added = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        added = F.pad(added, (self.edge - start, 0)).repeat(groups, 1)
        if self.kept:
            self._masks[name] = added
        return added


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
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    observed = layer in step.scored_layers
    reference = step.backend == "eager" or softcap is not None or s_aux is not None
    causal = step.contiguous and step.start == 0 and (sliding_window is None or step.end <= sliding_window)
    if layer == step.final_layer and step.positions.numel() > 1:
        last = Step(step.positions[-1:], step.backend)
        out, _none = attend(
            module, query[:, :, -1:], key, value, None, scaling, dropout, last, sliding_window, softcap, s_aux
        )
        return F.pad(out, (0, 0, 0, 0, query.shape[2] - 1, 0)), None
    if causal and not observed and not reference:
        return _causal(query, key, value, scale), None
    pieces = []
    for block in step.blocks(sliding_window):
        rows = query[:, :, block.first : block.last]
        if observed or reference:
            out, given = _explicit(rows, key, value, block, scale, softcap, s_aux)
            if observed and step.scores is not None:
                step.scores[block.low : block.high] += given / (query.shape[1] * step.positions.numel())
        else:
            out = _masked(rows, key, value, block, scale)
        pieces.append(out)
    if step.partial and layer == max(step.scored_layers):
        raise Enough
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention of a whole sequence; returns [1, m, heads, d]."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _masked(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
    """Attention of one block's rows; returns [1, m, heads, d].

    The heads that share keys are put side by side as rows: the CPU's kernel then loads keys once for all of them,
    and CUDA's fused kernels take a mask in this form only.
    """
    batch, heads, m, dim = q.shape
    groups = heads // k.shape[1]
    packed = q.reshape(batch, k.shape[1], groups * m, dim)
    if q.device.type == "cpu" and block.edge - block.low >= SPLIT_FROM and dim == v.shape[-1]:
        out = _split(packed, k, v, block, groups, scale)
    else:
        mask = block.added_mask(groups, block.low, q.dtype)
        keys, values = k[:, :, block.low : block.high], v[:, :, block.low : block.high]
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, m, v.shape[-1]).transpose(1, 2).contiguous()


def _split(q: Tensor, k: Tensor, v: Tensor, block: Block, groups: int, scale: float) -> Tensor:
    """The CPU's kernel, which is much faster without a mask, over the keys all rows see and over the rest.

    Two softmaxes over disjoint keys are joined by their log-sum-exp (as in Flash-Decoding).
    """
    mask = block.added_mask(groups, block.edge, q.dtype)
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k[:, :, start:end], v[:, :, start:end], attn_mask=added, scale=scale
        )
        for start, end, added in ((block.low, block.edge, None), (block.edge, block.high, mask))
    ]
    (before, before_lse), (out, lse) = parts
    share = torch.sigmoid(before_lse - lse)[..., None].to(q.dtype)
    joined: Tensor = torch.lerp(out, before, share)
    return joined


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention written out: [1, m, heads, d], and how much each key got in all, float32 [keys].

    One KV head after the other: the weights of all of them would not stay in the processor's cache.
    """
    _, heads, m, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    k, v = k[0, :, block.low : block.high], v[0, :, block.low : block.high]
    rows = q.reshape(kv_heads, groups * m, dim)
    hidden = ~block.mask()
    given = torch.zeros(k.shape[1], device=q.device)
    pieces = []
    for head in range(kv_heads):
        logits = (rows[head] @ k[head].T).float().mul_(scale).view(groups, m, -1)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits[..., block.edge - block.low :].masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(kv_heads, groups, 1, 1)[head].expand(-1, m, 1)
            weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        given += weights.sum(dim=(0, 1))
        pieces.append(weights.to(v.dtype).reshape(groups * m, -1) @ v[head])
    out = torch.stack(pieces).reshape(1, heads, m, -1)
    return out.transpose(1, 2).contiguous(), given


def attend_one(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, which takes one token that sees every key: as in `_masked`, heads that share keys are rows.

    Torch's kernel for CPUs reads the keys once for each head otherwise, and a single row of 16 bits number by number.
    """
    changed = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    batch, heads, m, dim = query.shape
    if m != 1 or attention_mask is not None or dropout or changed or heads % key.shape[1]:
        out, _none = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups, dim)
    if groups == 1 and query.dtype == torch.bfloat16:
        rows = rows.expand(-1, -1, 2, -1)
    out = F.scaled_dot_product_attention(rows, key, value, scale=scaling)[:, :, :groups]
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def mask_of_one(*args: Any, **options: Any) -> Tensor | None:
    """The mask for transformers' `sdpa`; none for a token that sees every key, as where the cache cuts the window."""
    mask: Tensor | None = sdpa_mask(*args, **options)
    if mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1 and bool(mask.all()):
        return None
    return mask


AttentionInterface.register(ATTENTION, attend)
AttentionInterface.register(DECODING, attend_one)
AttentionMaskInterface.register(DECODING, mask_of_one)
