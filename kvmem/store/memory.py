"""MemoryStore: entries in this process, the least recently used evicted first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping

from kvmem.entry import EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, StoreStats


class MemoryStore:
    """At most `max_bytes` of keys and values (None: no limit). An entry larger than that is not kept."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, KVEntry] = OrderedDict()
        self._groups: dict[str, dict[str, EntryInfo]] = {}
        self._documents: dict[str, str] = {}
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def documents(self) -> MutableMapping[str, str]:
        return self._documents

    def get(self, key: EntryKey) -> KVEntry | None:
        with self._lock:
            entry = self._entries.get(key.digest)
            if entry is None:
                self._misses += 1
                return None
            self._entries.move_to_end(key.digest)
            self._hits += 1
            return entry

    def put(self, entry: KVEntry) -> bool:
        size = entry.nbytes
        with self._lock:
            if entry.key.digest in self._entries:
                self._entries.move_to_end(entry.key.digest)
                return True
            if self.max_bytes is not None and size > self.max_bytes:
                return False
            while self.max_bytes is not None and self._bytes + size > self.max_bytes:
                self._drop(next(iter(self._entries)))
            self._entries[entry.key.digest] = entry
            self._groups.setdefault(entry.key.group, {})[entry.key.digest] = entry.info
            self._bytes += size
            return True

    def delete(self, key: EntryKey) -> bool:
        with self._lock:
            return self._drop(key.digest)

    def _drop(self, digest: str) -> bool:
        entry = self._entries.pop(digest, None)
        if entry is None:
            return False
        self._bytes -= entry.nbytes
        group = self._groups[entry.key.group]
        del group[digest]
        if not group:
            del self._groups[entry.key.group]
        return True

    def contains(self, key: EntryKey) -> bool:
        with self._lock:
            return key.digest in self._entries

    def find(self, key: EntryKey) -> list[EntryInfo]:
        with self._lock:
            return list(self._groups.get(key.group, {}).values())

    def keys(self) -> Iterator[EntryKey]:
        with self._lock:
            found = [entry.key for entry in self._entries.values()]
        return iter(found)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(len(self._entries), self._bytes, self._hits, self._misses)

    def check(self, fix: bool = False) -> list[Problem]:
        with self._lock:
            counted = sum(entry.nbytes for entry in self._entries.values())
            if counted == self._bytes:
                return []
            problem = Problem("counter", f"{self._bytes} bytes counted, {counted} kept", fix)
            if fix:
                self._bytes = counted
            return [problem]

    def close(self) -> None:
        with self._lock:
            self._entries.clear()
            self._groups.clear()
            self._bytes = 0
