"""Where entries and documents are kept."""

from kvmem.store.base import Problem, Store, StoreStats
from kvmem.store.disk import DiskStore
from kvmem.store.limits import Limits
from kvmem.store.memory import MemoryStore
from kvmem.store.remote import FsspecStore
from kvmem.store.tiered import TieredStore

__all__ = ["DiskStore", "FsspecStore", "Limits", "MemoryStore", "Problem", "Store", "StoreStats", "TieredStore"]
