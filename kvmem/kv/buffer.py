"""BlendedCache: the preallocated KV buffer in which prompts are composed and from which generation continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from kvmem.cancellation import NEVER, Cancellation
from kvmem.kv.attention import Step
from kvmem.kv.entry import EntryKey, KVEntry
from kvmem.kv.layer import BlendedLayer, Correction, LayerGroup, Move, Watch


class BlendedCache(Cache):
    """A `transformers.Cache` over preallocated rows, in which any subset of positions can be recomputed.

    It is a private copy: entries are copied in and never modified. `cancellation` is checked before each layer is
    written, so that a forward pass can stop between two layers.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        recurrent: Sequence[int] = (),
        cancellation: Cancellation = NEVER,
    ) -> None:
        self.groups = tuple(groups)
        self._watch = Watch(cancellation)
        self._kept = {
            index: BlendedLayer(index, group, capacity, dtype, device, self._watch)
            for group in self.groups
            for index in group.layers
        }
        self.blended: list[BlendedLayer] = [self._kept[index] for index in sorted(self._kept)]
        self.recurrent = {index: LinearAttentionLayer() for index in recurrent}
        layers: dict[int, Any] = {**self._kept, **self.recurrent}
        super().__init__(layers=[layers[index] for index in sorted(layers)])

    @property
    def cancellation(self) -> Cancellation:
        return self._watch.cancellation

    @cancellation.setter
    def cancellation(self, cancellation: Cancellation) -> None:
        self._watch.cancellation = cancellation

    @property
    def length(self) -> int:
        """The number of valid rows."""
        return self.blended[0].length

    @length.setter
    def length(self, rows: int) -> None:
        for layer in self.blended:
            layer.length = rows

    @property
    def capacity(self) -> int:
        return min(layer.capacity for layer in self.blended)

    def reserve(self, capacity: int) -> None:
        for layer in self.blended:
            layer.reserve(capacity)

    def copy_rows(self, source: BlendedCache, count: int) -> None:
        """Take over the first `count` rows of another cache of the same model."""
        for layer, other in zip(self.blended, source.blended, strict=True):
            layer.keys[:, :, :count] = other.keys[:, :, :count]
            layer.values[:, :, :count] = other.values[:, :, :count]
        self.length = count

    @contextmanager
    def stepping(self, step: Step, correction: Correction | None = None) -> Iterator[None]:
        """While the context is open, a forward pass writes to the step's positions instead of appending."""
        for layer in self.blended:
            layer.step, layer.correction = step, correction
        try:
            yield
        finally:
            for layer in self.blended:
                layer.step = layer.correction = None

    def load(self, entry: KVEntry, start: int) -> None:
        """Put an entry's rows at [start, start + n), with keys rotated (in float32) to the new positions.

        The copy happens when a layer is first accessed, or earlier in `load_ahead`.
        """
        for number, group in enumerate(self.groups):
            move = Move(entry.keys[number], entry.values[number], group.rope, entry.start, start)
            for place, index in enumerate(group.layers):
                self._kept[index].expect(move, place)
        pairs = zip(entry.states[::2], entry.states[1::2], strict=True)
        for recurrent, (convolved, remembered) in zip(self.recurrent.values(), pairs, strict=True):
            _restore(recurrent, convolved.to(self.device), remembered.to(self.device))

    def load_ahead(self) -> None:
        """Run the pending copies in a background thread, layer by layer, while the first layers are already in use."""

        def settle() -> None:
            # A failed copy stays pending; the next access to the layer raises its error.
            with suppress(Exception):
                for layer in self.blended:
                    layer.settle()

        if any(layer.is_expecting for layer in self.blended):
            Thread(target=settle, name="kvmem-load").start()

    @property
    def device(self) -> torch.device:
        return self.blended[0].device

    def states(self) -> tuple[Tensor, ...]:
        """CPU copies of the recurrent layers' states; empty if there are no such layers.

        Two tensors per layer: its convolution inputs and its recurrent state. A missing state is an empty tensor.
        """
        return tuple(
            torch.empty(0) if state is None else state.detach().cpu().clone()
            for layer in self.recurrent.values()
            for state in (layer.conv_states[0], layer.recurrent_states[0])
        )

    def slice(self, start: int, end: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of rows [start, end) on the CPU, stacked per layer group as in `KVEntry`."""
        keys, values = [], []
        for group in self.groups:
            members = [self._kept[index] for index in group.layers]
            keys.append(torch.stack([m.keys[0, :, start:end] for m in members]).cpu())
            values.append(torch.stack([m.values[0, :, start:end] for m in members]).cpu())
        return tuple(keys), tuple(values)

    def entry(self, key: EntryKey, token_ids: tuple[int, ...], start: int, spans: tuple[str, ...]) -> KVEntry:
        """The rows of the span that begins at `start`, as an entry."""
        keys, values = self.slice(start, start + len(token_ids))
        return KVEntry(key, token_ids, start, spans, keys, values, self.states())


def _restore(layer: LinearAttentionLayer, convolved: Tensor, remembered: Tensor) -> None:
    """Set a recurrent layer to a state that `BlendedCache.states` returned."""
    layer.lazy_initialization(convolved if convolved.numel() else None, remembered if remembered.numel() else None)
    for held, state in ((layer.conv_states[0], convolved), (layer.recurrent_states[0], remembered)):
        if held is not None and state.numel():
            held.copy_(state)
    layer.has_previous_state[0] = True
