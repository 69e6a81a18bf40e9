"""Entries as safetensors files, and back. No pickle is read or written anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kvmem.entry import FORMAT_VERSION, EntryKey, KVEntry, digest_tokens


class DamagedEntryError(Exception):
    """A file is not an entry of this format, or not the one it is said to be."""


def encode(entry: KVEntry) -> bytes:
    """The entry as the bytes of one safetensors file; see docs/file-format.md."""
    tensors = {"token_ids": torch.tensor(entry.token_ids, dtype=torch.int32)}
    for number, (keys, values) in enumerate(zip(entry.keys, entry.values, strict=True)):
        tensors[f"keys.{number}"] = keys.contiguous()
        tensors[f"values.{number}"] = values.contiguous()
    return save(tensors, metadata=_header(entry))


def _header(entry: KVEntry) -> dict[str, str]:
    return {
        "format": f"kvmem/{FORMAT_VERSION}",
        "namespace": entry.key.namespace,
        "fingerprint": entry.key.fingerprint,
        "context": entry.key.context,
        "tokens": entry.key.tokens,
        "start": str(entry.start),
        "spans": json.dumps(entry.spans),
    }


def decode(path: Path, key: EntryKey) -> KVEntry:
    """Read the entry of `key` from `path`; its tensors are mapped, not copied.

    Raises DamagedEntryError when the file is not that entry, OSError when it cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != f"kvmem/{FORMAT_VERSION}":
                raise DamagedEntryError(f"format {header.get('format')!r} is not kvmem/{FORMAT_VERSION}")
            if key_of(header) != key:
                raise DamagedEntryError("it belongs to another key")
            names = set(file.keys())
            groups = range(sum(name.startswith("keys.") for name in names))
            token_ids = tuple(file.get_tensor("token_ids").tolist())
            if digest_tokens(token_ids) != key.tokens:
                raise DamagedEntryError("its token ids are not those of its key")
            keys = _tensors(file, (f"keys.{n}" for n in groups))
            values = _tensors(file, (f"values.{n}" for n in groups))
            return KVEntry(key, token_ids, int(header["start"]), tuple(json.loads(header["spans"])), keys, values)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedEntryError(str(error)) from error


def _tensors(file: Any, names: Iterable[str]) -> tuple[torch.Tensor, ...]:
    return tuple(file.get_tensor(name) for name in names)


def key_of(header: dict[str, str]) -> EntryKey:
    """The key written in a file's header or an index row. Raises KeyError when a field is missing."""
    return EntryKey(header["namespace"], header["fingerprint"], header["context"], header["tokens"])
