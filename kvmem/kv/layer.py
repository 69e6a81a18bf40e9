"""BlendedLayer: one layer of the KV buffer, and the copies of entries that it is waiting for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvmem.cancellation import NEVER, Cancellation
from kvmem.kv.attention import Step
from kvmem.kv.rope import Rope, Turn


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers whose KV has the same shape, rotation and window.

    Attributes:
        layers: Layer indices.
        kv_heads: KV heads per layer.
        key_dim: Dimension of a key.
        value_dim: Dimension of a value.
        window: Number of keys that a query sees on sliding layers; None on full-attention layers.
        rope: The rotation of the keys; None if keys are not rotated (NoPE layers).
    """

    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    rope: Rope | None

    @property
    def elements_per_token(self) -> int:
        """Elements of KV per token, over all layers of the group."""
        return len(self.layers) * self.kv_heads * (self.key_dim + self.value_dim)


class Correction(Protocol):
    """Corrects the rows near the recomputed ones."""

    def apply(self, layer: BlendedLayer, new_keys: Tensor, new_values: Tensor) -> None:
        """Change `layer`'s rows in place, before the new rows ([1, kv heads, m, dim]) are written."""


@dataclass(frozen=True, eq=False)
class Move:
    """A pending copy of an entry's rows to [start, end), for one group of layers that share a rotation."""

    keys: Tensor
    values: Tensor
    rope: Rope | None
    old_start: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.keys.shape[2]

    @cached_property
    def turn(self) -> Turn | None:
        if self.rope is None or self.start == self.old_start:
            return None
        rows = torch.arange(self.keys.shape[2])
        return self.rope.move(rows + self.old_start, rows + self.start)

    def copy(self, place: int, keys: Tensor, values: Tensor) -> None:
        """Copy the rows of the group's layer at index `place` into that layer's buffers; rotates keys in float32."""
        keys[0, :, self.start : self.end] = self.keys[place] if self.turn is None else self.turn.apply(self.keys[place])
        values[0, :, self.start : self.end] = self.values[place]


@dataclass
class Watch:
    """The cancellation that may end a forward pass between two layers; shared by all layers."""

    cancellation: Cancellation = NEVER


class BlendedLayer(CacheLayerMixin):
    """One layer: `keys` and `values` are [batch, kv heads, capacity, dim]; the first `length` rows are valid.

    Accessing `keys` or `values` first completes the copies requested with `expect`.
    """

    is_croppable = True

    def __init__(
        self,
        index: int,
        group: LayerGroup,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        watch: Watch,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.group, self._watch = index, group, watch
        self.dtype, self.device = dtype, device
        self._expected: deque[tuple[Move, int]] = deque()
        self._copying = Lock()
        self.keys = torch.empty((1, group.kv_heads, capacity, group.key_dim), dtype=dtype, device=device)
        self.values = torch.empty((1, group.kv_heads, capacity, group.value_dim), dtype=dtype, device=device)
        self.length = 0
        self.is_initialized = True
        self.step: Step | None = None
        self.correction: Correction | None = None

    @property
    def keys(self) -> Tensor:
        self.settle()
        return self._keys

    @keys.setter
    def keys(self, rows: Tensor) -> None:
        self._keys = rows

    @property
    def values(self) -> Tensor:
        self.settle()
        return self._values

    @values.setter
    def values(self, rows: Tensor) -> None:
        self._values = rows

    @property
    def capacity(self) -> int:
        return self._keys.shape[2]

    @property
    def is_expecting(self) -> bool:
        """Whether copies are pending."""
        return bool(self._expected)

    def expect(self, move: Move, place: int) -> None:
        """Schedule a copy to run before the next access to `keys` or `values`."""
        self._expected.append((move, place))

    def settle(self) -> None:
        """Run the pending copies in order. Thread-safe."""
        if not self._expected:
            return
        with self._copying:
            while self._expected:
                move, place = self._expected[0]
                move.copy(place, self._keys, self._values)
                self._expected.popleft()

    @property
    def is_sliding(self) -> bool:
        return self.group.window is not None

    @property
    def sliding_window(self) -> int | None:
        return self.group.window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffer is allocated at construction."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new rows and return the rows that attention may see.

        Inside a step, the rows go to the step's positions, and all rows up to its last position are returned.
        Otherwise they are appended, as in any transformers cache.
        """
        self._watch.cancellation.check()
        if self.step is None:
            return self._append(key_states, value_states)
        self.step.layers_entered += 1
        if self.correction is not None:
            self.correction.apply(self, key_states, value_states)
        step = self.step
        if step.contiguous:
            self.keys[:, :, step.start : step.end] = key_states
            self.values[:, :, step.start : step.end] = value_states
        else:
            self.keys.index_copy_(2, step.positions, key_states)
            self.values.index_copy_(2, step.positions, value_states)
        return self.keys[:, :, : step.end], self.values[:, :, : step.end]

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        low, old, new = self._visible_from(), self.length, self.length + key_states.shape[2]
        self.reserve(new)
        self.keys[:, :, old:new] = key_states
        self.values[:, :, old:new] = value_states
        self.length = new
        return self.keys[:, :, low:new], self.values[:, :, low:new]

    def _visible_from(self) -> int:
        return 0 if self.group.window is None else max(0, self.length - self.group.window + 1)

    def reserve(self, capacity: int) -> None:
        """Grow to at least `capacity` rows and keep the valid ones."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, self.capacity * 3 // 2)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            grown = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            grown[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, grown)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        low = self._visible_from()
        return self.length - low + query_length, low

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        self.length = max(0, self.length - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keys = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def reset(self) -> None:
        self.length = 0
