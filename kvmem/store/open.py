"""The store that a directory, or nothing, stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvmem.settings import StoreSettings
from kvmem.store.base import Store
from kvmem.store.disk import DiskStore
from kvmem.store.memory import MemoryStore
from kvmem.store.tiered import TieredStore


def open_store(store: str | os.PathLike[str] | Store | None, settings: StoreSettings) -> Store:
    """A store object as it is; memory over disk for a directory; memory alone for None."""
    if store is not None and not isinstance(store, (str, os.PathLike)):
        return store
    shared: Any = {
        "namespace_bytes": settings.namespace_bytes,
        "policy": settings.eviction,
        "ttl": settings.ttl,
    }
    memory = MemoryStore(settings.memory_bytes, **shared)
    if store is None:
        return memory
    options: Any = {"max_bytes": settings.disk_bytes, "kv_dtype": settings.kv_dtype, "verify": settings.verify}
    return TieredStore(memory, DiskStore(Path(store), **options, **shared))
