"""Encodes entries as safetensors files and decodes them; see docs/file-format.md. Pickle is never used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvmem.errors import InputError
from kvmem.kv.entry import FORMAT_VERSION, EntryKey, KVEntry, digest_tokens

KVDtype = Literal["native", "int8", "fp8"]
_STORED = {"int8": (torch.int8, 127.0), "fp8": (getattr(torch, "float8_e4m3fn", None), 448.0)}


class DamagedEntryError(Exception):
    """A file is not a valid entry, or not the expected one."""


class _Fields(Protocol):
    def __getitem__(self, name: Any, /) -> Any: ...


def check_kv_dtype(name: str) -> KVDtype:
    """Return `name` if it is a supported storage type. Raises InputError."""
    if name not in ("native", *_STORED) or (name in _STORED and _STORED[name][0] is None):
        raise InputError(f"kv_dtype={name!r} is not supported by this torch. Use 'native', 'int8' or 'fp8'.")
    return name  # type: ignore[return-value]


def encode(entry: KVEntry, kv_dtype: KVDtype = "native") -> bytes:
    """Encode an entry as the bytes of one safetensors file.

    With "int8" or "fp8", keys are scaled per channel (over the span's tokens) and values per token (over the
    channels), as in KIVI (ICML'24). Scales are bfloat16, because values of bfloat16 models can overflow float16.
    """
    tensors = {"token_ids": torch.tensor(entry.token_ids, dtype=torch.int32)}
    for number, (keys, values) in enumerate(zip(entry.keys, entry.values, strict=True)):
        if kv_dtype == "native":
            tensors[f"keys.{number}"], tensors[f"values.{number}"] = keys.contiguous(), values.contiguous()
        else:
            for name, tensor, axis in (("keys", keys, -2), ("values", values, -1)):
                packed, scale = _pack(tensor, axis, kv_dtype)
                tensors[f"{name}.{number}"], tensors[f"{name}_scale.{number}"] = packed, scale
    for number, state in enumerate(entry.states):
        tensors[f"states.{number}"] = state.contiguous()
    header = {
        "format": f"kvmem/{FORMAT_VERSION}",
        "namespace": entry.key.namespace,
        "fingerprint": entry.key.fingerprint,
        "context": entry.key.context,
        "tokens": entry.key.tokens,
        "start": str(entry.start),
        "spans": json.dumps(entry.spans),
        "kv_dtype": kv_dtype,
        "dtype": str(entry.keys[0].dtype).removeprefix("torch."),
    }
    return save(tensors, metadata=header)


def _pack(tensor: Tensor, axis: int, kv_dtype: KVDtype) -> tuple[Tensor, Tensor]:
    """Pack `tensor` into 8 bits; return it with its bfloat16 scale along `axis`."""
    dtype, largest = _STORED[kv_dtype]
    # Enlarged slightly: if rounding made the scale smaller, the largest number would be clipped.
    scale = (tensor.float().abs().amax(axis, keepdim=True) * (1.004 / largest)).clamp_min(1e-20).bfloat16()
    scaled = (tensor.float() / scale.float()).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype).contiguous(), scale.contiguous()


def decode(path: Path, key: EntryKey | None) -> KVEntry:
    """Read the entry with this `key` from `path`; None accepts any entry.

    Native tensors are memory-mapped, not copied; packed tensors are unpacked.
    Raises DamagedEntryError if the file is not that entry, OSError if it cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != f"kvmem/{FORMAT_VERSION}":
                raise DamagedEntryError(f"format {header.get('format')!r} is not kvmem/{FORMAT_VERSION}")
            key = key or key_of(header)
            if key_of(header) != key:
                raise DamagedEntryError("it belongs to a different key")
            names = set(file.keys())
            groups = range(sum(name.startswith("keys.") for name in names))
            token_ids = tuple(file.get_tensor("token_ids").tolist())
            if digest_tokens(token_ids) != key.tokens:
                raise DamagedEntryError("its token ids do not match its key")
            dtype = getattr(torch, header["dtype"])
            keys = tuple(_tensor(file, names, f"keys.{n}", dtype) for n in groups)
            values = tuple(_tensor(file, names, f"values.{n}", dtype) for n in groups)
            recurrent = range(sum(name.startswith("states.") for name in names))
            states = tuple(file.get_tensor(f"states.{n}") for n in recurrent)
            spans = tuple(json.loads(header["spans"]))
            return KVEntry(key, token_ids, int(header["start"]), spans, keys, values, states)
    # torch raises RuntimeError if the file disappears before it is mapped.
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedEntryError(str(error)) from error


def _tensor(file: Any, names: set[str], name: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    scale = name.replace(".", "_scale.")
    if scale not in names:
        return tensor
    return tensor.float().mul_(file.get_tensor(scale).float()).to(dtype)


def key_of(fields: _Fields) -> EntryKey:
    """The key in a file's header or an index row. Raises KeyError if a field is missing."""
    return EntryKey(fields["namespace"], fields["fingerprint"], fields["context"], fields["tokens"])
