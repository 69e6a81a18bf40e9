"""Attention over a buffer in which any subset of positions is being computed.

The function is registered with transformers' attention interface, so an unmodified model runs it. Its mask depends on
positions only: key_position <= query_position, and within the window on sliding layers. It never uses `is_causal` for
a subset: that mask is aligned to a corner of the matrix and would let early tokens see later ones.
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
# The layers of a step share their masks unless the masks would cover more than this many (query, key) pairs.
MASK_PAIRS = 16 << 20
# If all rows of a block see at least this many keys, attention over those keys runs without a mask.
SPLIT_FROM = 256


@dataclass(eq=False)
class Step:
    """One forward pass over a `BlendedCache`: which positions are computed, and what is recorded.

    Attributes:
        positions: int64 [m], strictly ascending.
        backend: The attention implementation.
        scored_layers: The layers whose attention weights are recorded.
        scores: float32 [total]; each scored layer adds its attention to every key position, averaged over heads and
            over the m rows.
        final_layer: The model's last layer, if only the last token's output is needed. The other rows skip attention
            there, since their keys and values do not depend on it.
        partial: The pass only collects scores and ends (with `Enough`) in the last scored layer.
        layers_entered: Number of layers that have computed keys so far.
        layers_seen: Number of layers that have computed attention so far.
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
        """Model work so far, in tokens x layers."""
        return self.positions.numel() * self.layers_entered

    def blocks(self, window: int | None) -> list[Block]:
        """The rows, split into blocks, each with the range of keys it can see."""
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
    """Ends a forward pass early: the remaining layers are not needed."""


@dataclass(eq=False)
class Block:
    """Rows [first, last) of a step, at `positions`, and the keys [low, high) that at least one of them can see.

    Every row sees keys [low, edge); masks cover [edge, high). If `kept`, masks are built once and reused.
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
        """bool [rows, high - edge]: True where the row may attend."""
        keys = torch.arange(self.edge, self.high, device=self.positions.device)[None, :]
        mask = keys <= self.positions[:, None]
        return mask if self.window is None else mask & (keys > self.positions[:, None] - self.window)

    def added_mask(self, groups: int, start: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [groups * rows, high - start]: 0 where the row may attend, else -inf.

        Built here because the kernels would convert a boolean mask in every layer.
        """
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
        raise ValueError("this attention needs kvmem's positions and does not support position bias")
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
    """Plain causal attention over a whole sequence; returns [1, m, heads, d]."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _masked(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
    """Attention for one block's rows; returns [1, m, heads, d].

    Heads that share keys are packed as rows: the CPU kernel then loads the keys once for all of them, and CUDA's fused
    kernels accept a mask only in this form.
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
    """Run the CPU kernel without a mask (much faster) over the keys that all rows see, and with a mask over the rest.

    The two softmaxes over disjoint keys are merged by their log-sum-exp (as in Flash-Decoding).
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
    """Reference attention: the output [1, m, heads, d] and the total weight of each key, float32 [keys].

    Processes one KV head at a time, so that the weights stay in the CPU cache.
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
    """transformers' `sdpa`, with a fast path for a single token that sees every key.

    Heads that share keys are packed as rows, as in `_masked`. Otherwise torch's CPU kernel reads the keys once per head
    and does not vectorise a single 16-bit row.
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
    """The mask for transformers' `sdpa`; None for a single token that sees every key in the cache."""
    mask: Tensor | None = sdpa_mask(*args, **options)
    if mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1 and bool(mask.all()):
        return None
    return mask


AttentionInterface.register(ATTENTION, attend)
AttentionInterface.register(DECODING, attend_one)
AttentionMaskInterface.register(DECODING, mask_of_one)
