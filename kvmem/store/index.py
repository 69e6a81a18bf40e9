"""The index beside the entry files: diskcache (SQLite), holding JSON only."""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_BINARY, MODE_RAW, UNKNOWN


class JSONDisk(diskcache.Disk):  # type: ignore[misc]
    """Stores text keys and JSON values as bytes. A row in any other form is an error: nothing is unpickled."""

    def put(self, key: Any) -> tuple[Any, bool]:
        if not isinstance(key, str):
            raise TypeError(f"keys of the index are text, not {type(key).__name__}")
        return super().put(key)  # type: ignore[no-any-return]

    def get(self, key: Any, raw: bool) -> Any:
        if not raw or not isinstance(key, str):
            raise ValueError("a row of the index was not written by kvmem")
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> Any:
        return super().store(json.dumps(value).encode(), read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (MODE_RAW, MODE_BINARY) or read:
            raise ValueError("a row of the index was not written by kvmem")
        return json.loads(super().fetch(mode, filename, value, read))


def open_index(directory: Path) -> diskcache.Cache:
    """A diskcache that never evicts by itself."""
    return diskcache.Cache(
        str(directory),
        disk=JSONDisk,
        disk_min_file_size=1 << 40,  # everything in SQLite, under its journal; never in files beside it
        eviction_policy="none",
        cull_limit=0,
        size_limit=1 << 62,
        timeout=60,
    )


class Documents(MutableMapping[str, str]):
    """A mapping of text to text over an index."""

    def __init__(self, cache: diskcache.Cache) -> None:
        self._cache = cache

    def __getitem__(self, name: str) -> str:
        value = self._cache.get(name)
        if value is None:
            raise KeyError(name)
        return str(value)

    def __setitem__(self, name: str, text: str) -> None:
        self._cache.set(name, text)

    def __delitem__(self, name: str) -> None:
        if not self._cache.delete(name):
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._cache.iterkeys()))

    def __len__(self) -> int:
        return len(self._cache)
