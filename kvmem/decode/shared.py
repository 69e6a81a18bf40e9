"""Several sequences after a shared prefix, whose keys and values are stored once and loaded once for all of them.

As in Hydragen (Juravsky et al., 2024): attention over the shared prefix packs the queries of all sequences into one
matrix, attention over each sequence's own tokens is batched, and the two softmaxes are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kvmem.kv.buffer import BlendedCache
from kvmem.kv.layer import BlendedLayer
from kvmem.model.local import LanguageModel

SHARED_ATTENTION = "kvmem_shared"


class SharedLayer(CacheLayerMixin):
    """One layer: `prefix` holds the shared rows; `keys` and `values` ([batch, kv heads, capacity, dim]) hold each
    sequence's own rows."""

    def __init__(self, prefix: BlendedLayer, batch: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix = prefix
        group = prefix.group
        options: dict[str, Any] = {"dtype": prefix.dtype, "device": prefix.device}
        self.keys: Tensor = torch.empty((batch, group.kv_heads, capacity, group.key_dim), **options)
        self.values: Tensor = torch.empty((batch, group.kv_heads, capacity, group.value_dim), **options)
        self.tail = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the rows are allocated at construction."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new rows and return each sequence's own rows."""
        start, self.tail = self.tail, self.tail + key_states.shape[2]
        self.keys[:, :, start : self.tail] = key_states
        self.values[:, :, start : self.tail] = value_states
        return self.keys[:, :, : self.tail], self.values[:, :, : self.tail]

    @property
    def window(self) -> int | None:
        return self.prefix.group.window

    def near(self, places: Tensor, padding: Tensor) -> tuple[int, Tensor | None]:
        """The first prefix row that any sequence sees from `places`, and a mask over the rows from there on.

        The mask is bool [batch, m, rows], True where the row is visible; None if everything is visible.
        """
        if self.window is None:
            return 0, None
        length = self.prefix.length
        positions = length + places - padding[:, None]
        low = min(length, max(0, int(positions.min()) - self.window + 1))
        rows = torch.arange(low, length, device=places.device)
        return low, rows > positions[..., None] - self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix.length + self.tail + query_length, 0

    def get_seq_length(self) -> int:
        return self.prefix.length + self.tail

    def get_max_length(self) -> int:
        return -1


class SharedCache(Cache):
    """A `transformers.Cache` for `padding.numel()` sequences after the valid rows of `prefix`, which is not modified.

    padding: int64 [batch], the number of left-padding rows at the start of each sequence.
    """

    def __init__(self, prefix: BlendedCache, padding: Tensor, capacity: int) -> None:
        self.shared = [SharedLayer(layer, len(padding), capacity) for layer in prefix.blended]
        self.by_index = {layer.prefix.index: layer for layer in self.shared}
        self.padding = padding.to(prefix.device)
        super().__init__(layers=list(self.shared))

    @contextmanager
    def attending(self, model: LanguageModel) -> Iterator[None]:
        """While the context is open, every forward pass of the model uses this cache and `attend_shared`."""

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": None, "kvmem_shared": self}

        with ExitStack() as inside:
            inside.enter_context(model.attention(SHARED_ATTENTION))
            hook = model.hf.register_forward_pre_hook(before, with_kwargs=True)
            inside.callback(hook.remove)
            yield


def attend_shared(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kvmem_shared: SharedCache | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: query [batch, heads, m, d], key/value [batch, kv heads, own rows, d]."""
    if kvmem_shared is None or position_bias is not None:
        raise ValueError("this attention needs kvmem's shared cache and does not support position bias")
    layer = kvmem_shared.by_index[int(module.layer_idx)]  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    batch, heads, m, dim = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    # Heads that share keys are packed as rows of one matrix: [batch, kv heads, groups * m, d].
    packed = query.reshape(batch, kv_heads, groups * m, dim)
    own, own_lse = _over_own(packed, key, value, m, kvmem_shared.padding, layer.window, scale, softcap)
    prefix, prefix_lse = _over_prefix(packed, layer, key.shape[2], m, kvmem_shared.padding, scale, softcap)
    parts = [own_lse, prefix_lse]
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, kv_heads, groups, 1).expand(batch, -1, -1, m)
        parts.append(sinks.reshape(own_lse.shape))
    whole = torch.stack(parts).logsumexp(0)
    joined = own * (own_lse - whole).exp()[..., None] + prefix * (prefix_lse - whole).exp()[..., None]
    result = joined.to(query.dtype).reshape(batch, heads, m, -1)
    return result.transpose(1, 2).contiguous(), None


def _over_own(
    q: Tensor, k: Tensor, v: Tensor, m: int, padding: Tensor, window: int | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence to its own rows: float32 [batch, kv heads, groups * m, d], and its log-sum-exp."""
    own = k.shape[2]
    rows = torch.arange(own, device=q.device)
    places = rows[own - m :, None]
    seen = (rows <= places) & (rows >= padding[:, None, None])
    if window is not None:
        seen &= rows > places - window
    # A padding row sees itself, because a softmax over nothing is undefined.
    seen |= rows == places
    logits = _capped((q @ k.transpose(2, 3)).float().mul_(scale), softcap)
    hidden = ~seen[:, None].repeat(1, 1, q.shape[2] // m, 1)
    logits = logits.masked_fill(hidden, float("-inf"))
    return (logits.softmax(-1).to(v.dtype) @ v).float(), logits.logsumexp(-1)


def _over_prefix(
    q: Tensor, layer: SharedLayer, own: int, m: int, padding: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of all sequences to the shared prefix, with the same shapes as `_over_own`."""
    batch, kv_heads, rows, dim = q.shape
    low, near = layer.near(torch.arange(own - m, own, device=q.device), padding)
    keys, values = (t[0, :, low : layer.prefix.length] for t in (layer.prefix.keys, layer.prefix.values))
    if not keys.shape[1]:
        return q.new_zeros((*q.shape[:3], values.shape[-1])).float(), q.new_full(q.shape[:3], -torch.inf).float()
    flat = q.transpose(0, 1).reshape(kv_heads, batch * rows, dim)
    if near is None and softcap is None and q.device.type == "cpu" and dim == values.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            flat[None], keys[None], values[None], scale=scale
        )
        out, lse = out[0], lse[0]
    else:
        logits = _capped((flat @ keys.transpose(1, 2)).float().mul_(scale), softcap)
        if near is not None:
            hidden = ~near[:, None].expand(-1, rows // m, -1, -1).reshape(1, batch * rows, -1)
            logits = logits.masked_fill(hidden, float("-inf"))
        lse = logits.logsumexp(-1)
        out = torch.nan_to_num(logits.softmax(-1)).to(values.dtype) @ values
    return (
        out.float().reshape(kv_heads, batch, rows, -1).transpose(0, 1),
        lse.float().reshape(kv_heads, batch, rows).transpose(0, 1),
    )


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def left_padded(own: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sequences, left-padded to equal length ([batch, longest]), and the number of padding tokens in each."""
    longest = max(map(len, own))
    rows = [[filler] * (longest - len(ids)) + list(ids) for ids in own]
    padding = torch.tensor([longest - len(ids) for ids in own], device=device)
    return torch.tensor(rows, device=device), padding


AttentionInterface.register(SHARED_ATTENTION, attend_shared)
