"""Fingerprint: what the KV of a model depends on, and whether that has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from kvmem.kv.entry import FORMAT_VERSION

_IRRELEVANT = ("_name_or_path", "transformers_version", "architectures", "_attn_implementation")
# Tensors of which one element is compared, to notice changes that PyTorch does not count (through `.data`).
_SAMPLED = 32


class Fingerprint:
    """A hash of everything the KV of a model depends on, kept until `refresh` sees a change.

    It covers weights, adapters (which are active or merged, and their scaling), config, tokenizer, chat template and
    dtype. Not covered: forward hooks that change what a layer computes, and single elements that are changed through
    `Tensor.data`, which PyTorch does not count. Reload the model after such a change.

    Args:
        hf: the transformers model.
        tokenizer: its tokenizer.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any) -> None:
        self._hf: Any = hf
        self._tokenizer = tokenizer
        self._value: str | None = None
        self._state: object = None
        self._packed: tuple[str, ...] = ()

    @property
    def value(self) -> str:
        """32 hexadecimal digits."""
        if self._value is None:
            self._state, self._value = self._look(), self._compute()
        return self._value

    def refresh(self) -> None:
        """Notice changed weights and adapters. Costs about a millisecond while nothing has changed."""
        if self._value is not None and self._look() != self._state:
            self._value = None

    def pack(self) -> None:
        """Call after packing the weights: they give the same KV but can no longer be read."""
        self._packed = (self.value,)
        self._state = self._look()

    def _look(self) -> object:
        """What is compared to notice a change; in one walk, since it is done for every prompt."""
        tensors: list[Tensor] = []
        adapted = False
        waiting: list[nn.Module] = [self._hf]
        while waiting:
            layer = waiting.pop()
            waiting += [below for below in layer._modules.values() if below is not None]
            tensors += [tensor for tensor in layer._parameters.values() if tensor is not None]
            if layer._buffers:
                passing = layer._non_persistent_buffers_set
                kept = [tensor for name, tensor in layer._buffers.items() if name not in passing]
                tensors += [tensor for tensor in kept if tensor is not None]
            adapted = adapted or _has_adapters(layer)
        versions = [(id(tensor), tensor._version) for tensor in tensors]
        return versions, _samples(tensors), list(_adapters(self._hf)) if adapted else []

    def _compute(self) -> str:
        weights = xxhash.xxh3_128()
        for name, tensor in sorted(self._hf.state_dict().items()):
            if tensor.layout == torch.strided:
                weights.update(name.encode())
                for part in _plain(tensor):
                    data: Any = part.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
                    weights.update(data)
        config = {name: value for name, value in self._hf.config.to_dict().items() if name not in _IRRELEVANT}
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        vocabulary = json.dumps(self._tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
        parts = [
            weights.hexdigest(),
            json.dumps(config, sort_keys=True, default=str),
            xxhash.xxh3_128_hexdigest(vocabulary.encode()),
            str(self._tokenizer.chat_template),
            str(self._hf.dtype),
            str(FORMAT_VERSION),
            *self._packed,
        ]
        if adapters := list(_adapters(self._hf)):
            parts.append(json.dumps(adapters))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised one (a subclass) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, settings = tensor.__tensor_flatten__()
    yield torch.tensor(list(repr(settings).encode()), dtype=torch.uint8)
    for name in names:
        yield from _plain(getattr(tensor, name))


def _samples(tensors: list[Tensor]) -> tuple[float, ...]:
    """An element of some tensors that can be read."""
    step = max(1, len(tensors) // _SAMPLED)
    readable = [tensor for tensor in tensors[::step] if _is_readable(tensor)]
    if not readable:
        return ()
    with torch.no_grad():
        found = [tensor.view(-1)[tensor.numel() // 2].float() for tensor in readable]
        return tuple(torch.stack(found).tolist())


def _is_readable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.is_contiguous() and tensor.numel() > 0


def _has_adapters(layer: nn.Module) -> bool:
    # Models of transformers have a method of that name.
    return isinstance(getattr(type(layer), "active_adapters", None), property)


def _adapters(hf: nn.Module) -> Iterator[list[Any]]:
    """The state of every layer that has adapters, as PEFT keeps it. None of them matter while all are disabled."""
    for name, layer in hf.named_modules():
        if not _has_adapters(layer):
            continue
        merged = sorted(getattr(layer, "merged_adapters", ()))
        active = [] if getattr(layer, "disable_adapters", False) else list(getattr(layer, "active_adapters", ()))
        if active or merged:
            scaling = {key: float(value) for key, value in getattr(layer, "scaling", {}).items() if key in active}
            yield [name, active, merged, sorted(scaling.items())]
