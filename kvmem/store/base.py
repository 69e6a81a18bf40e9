"""The protocol that every store follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvmem.kv.entry import EntryInfo, EntryKey, KVEntry

if TYPE_CHECKING:
    from kvmem.store.records import Database


@dataclass(frozen=True)
class StoreStats:
    """entries, bytes: what is kept now. hits, misses: of `get`; a durable store goes on counting after a restart.
    evicted: entries that gave way to others, since the store was opened here, of whatever namespace."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evicted: int = 0

    @property
    def hit_rate(self) -> float | None:
        """The share of `get` that found an entry; None before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


@dataclass(frozen=True)
class Problem:
    """One inconsistency: what (a short word), where (a file or key), and whether `check` mended it."""

    what: str
    where: str
    fixed: bool


class Store(Protocol):
    """Keeps entries by key. Every method may be called from any thread.

    Returned entries must never be written to; they stay valid after a later `delete`. A namespace's entries are
    reached only with its name; None, where it is allowed, is for operators and means all of them.
    """

    @property
    def database(self) -> Database:
        """The records of the store: documents, memories and conversations, kept as durably as entries."""

    def get(self, key: EntryKey) -> KVEntry | None:
        """The entry, or None. A damaged entry is removed and is a miss; never raises for one."""

    def put(self, entry: KVEntry) -> bool:
        """Keep `entry`; it is durable on return. One of the same key stays as it is.

        False when it cannot be kept (over the budget, a full disk); that is logged and never raised.
        """

    def delete(self, key: EntryKey) -> bool:
        """Remove the entry; False when there was none."""

    def clear(self, namespace: str) -> int:
        """Remove every entry of a namespace, pinned ones too; the number removed."""

    def scrub(self, namespace: str) -> None:
        """Make sure that nothing removed can be read back from files, counts of that namespace included. Raises
        StoreError when it cannot be made sure."""

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        """Keep the entry out of eviction, or no longer; False when there is none."""

    def contains(self, key: EntryKey) -> bool:
        """Whether `get` would most likely find it."""

    def find(self, key: EntryKey) -> list[EntryInfo]:
        """Every entry of these tokens (namespace, model and token ids of `key`), whatever its context."""

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        """The keys of all entries, in no particular order."""

    def stats(self, namespace: str | None = None) -> StoreStats:
        """Counts and bytes, see `StoreStats`."""

    def check(self, fix: bool = False) -> list[Problem]:
        """Every inconsistency between index and entries; with `fix`, mended by removal."""

    def close(self) -> None:
        """Release files. Calling it again does nothing."""
