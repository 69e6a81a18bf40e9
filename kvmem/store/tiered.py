"""TieredStore: a small fast store in front of a durable one."""

from __future__ import annotations

from collections.abc import Iterator

from kvmem.kv.entry import EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, Store, StoreStats
from kvmem.store.records import Database


class TieredStore:
    """A fast store in front of a durable one.

    Reads try `fast` first. Writes and deletes go to `durable` first, so an entry is only in memory if `durable` could
    not keep it.

    Attributes:
        fast: A small, fast store, such as a `MemoryStore`.
        durable: The store that keeps everything, documents included.

    Example:
        ```python
        store = TieredStore(MemoryStore(max_bytes=1 << 30), FsspecStore("s3://bucket/kv"))
        with KVMem("smollm2", store) as mem:
            mem.add("The rent is 3,200 euros a month.", id="lease")
        ```
    """

    def __init__(self, fast: Store, durable: Store) -> None:
        self.fast, self.durable = fast, durable

    @property
    def database(self) -> Database:
        return self.durable.database

    def get(self, key: EntryKey) -> KVEntry | None:
        entry = self.fast.get(key)
        if entry is None:
            entry = self.durable.get(key)
            if entry is not None:
                self.fast.put(entry)
        return entry

    def put(self, entry: KVEntry) -> bool:
        kept = self.durable.put(entry)
        self.fast.put(entry)
        return kept

    def delete(self, key: EntryKey) -> bool:
        found = self.durable.delete(key)
        return self.fast.delete(key) or found

    def clear(self, namespace: str) -> int:
        removed = self.durable.clear(namespace)
        return max(self.fast.clear(namespace), removed)

    def scrub(self, namespace: str) -> None:
        self.fast.scrub(namespace)
        self.durable.scrub(namespace)

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        self.fast.pin(key, pinned)
        return self.durable.pin(key, pinned)

    def contains(self, key: EntryKey) -> bool:
        return self.fast.contains(key) or self.durable.contains(key)

    def find(self, key: EntryKey) -> list[EntryInfo]:
        above = {info.key: info for info in self.fast.find(key)}
        return list({**above, **{info.key: info for info in self.durable.find(key)}}.values())

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        return self.durable.keys(namespace)

    def stats(self, namespace: str | None = None) -> StoreStats:
        below, above = self.durable.stats(namespace), self.fast.stats(namespace)
        return StoreStats(below.entries, below.bytes, above.hits + below.hits, below.misses, below.evicted)

    def check(self, fix: bool = False) -> list[Problem]:
        return [*self.fast.check(fix), *self.durable.check(fix)]

    def close(self) -> None:
        self.fast.close()
        self.durable.close()
