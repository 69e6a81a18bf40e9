"""MemoryStore: entries in this process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from kvmem.kv.entry import EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, StoreStats
from kvmem.store.limits import Limits, Policy
from kvmem.store.memory_records import MemoryDatabase


@dataclass(eq=False)
class _Kept:
    entry: KVEntry
    expires: float
    used: int
    uses: int = 0
    pinned: bool = False


class MemoryStore:
    """At most `max_bytes` of keys and values; the other arguments are those of `Limits`."""

    def __init__(
        self,
        max_bytes: int | None = None,
        *,
        namespace_bytes: int | None = None,
        policy: Policy = "lru",
        ttl: float | None = None,
    ) -> None:
        self.limits = Limits(max_bytes, namespace_bytes, policy, ttl)
        self._kept: dict[str, _Kept] = {}
        self._groups: dict[str, dict[str, EntryInfo]] = {}
        self._usage: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._database = MemoryDatabase()
        self._clock = self._evicted = 0
        self._lock = threading.RLock()

    @property
    def database(self) -> MemoryDatabase:
        return self._database

    def get(self, key: EntryKey) -> KVEntry | None:
        with self._lock:
            kept = self._alive(key.digest)
            (self._misses if kept is None else self._hits)[key.namespace] += 1
            if kept is None:
                return None
            self._clock += 1
            kept.used, kept.uses = self._clock, kept.uses + 1
            return kept.entry

    def _alive(self, digest: str) -> _Kept | None:
        kept = self._kept.get(digest)
        if kept is not None and kept.expires <= time.time():
            self._drop(digest)
            return None
        return kept

    def put(self, entry: KVEntry) -> bool:
        size, key = entry.nbytes, entry.key
        with self._lock:
            if self._alive(key.digest) is not None:
                return True
            if not self.limits.fits_at_all(size) or not self._make_room(key.namespace, size):
                return False
            self._clock += 1
            expires = float("inf") if self.limits.ttl is None else time.time() + self.limits.ttl
            # From a store below this one: it has had some of its time there.
            expires = min(expires, float("inf") if entry.expires is None else entry.expires)
            self._kept[key.digest] = _Kept(entry, expires, self._clock)
            self._groups.setdefault(key.group, {})[key.digest] = entry.info
            self._usage[key.namespace] += size
            return True

    def _make_room(self, namespace: str, size: int) -> bool:
        while victims := self.limits.victims(self._usage, namespace, size):
            candidates = [
                (kept.uses if self.limits.policy == "lfu" else 0, kept.used, digest)
                for digest, kept in self._kept.items()
                if kept.entry.key.namespace in victims and not kept.pinned
            ]
            if not candidates:
                return False
            self._drop(min(candidates)[2])
            self._evicted += 1
        return True

    def delete(self, key: EntryKey) -> bool:
        with self._lock:
            return self._drop(key.digest)

    def clear(self, namespace: str) -> int:
        with self._lock:
            digests = [d for d, kept in self._kept.items() if kept.entry.key.namespace == namespace]
            return sum(self._drop(digest) for digest in digests)

    def scrub(self, namespace: str) -> None:
        """Nothing is in files."""

    def _drop(self, digest: str) -> bool:
        kept = self._kept.pop(digest, None)
        if kept is None:
            return False
        key = kept.entry.key
        self._usage[key.namespace] -= kept.entry.nbytes
        if not self._usage[key.namespace]:
            del self._usage[key.namespace]
        del self._groups[key.group][digest]
        if not self._groups[key.group]:
            del self._groups[key.group]
        return True

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        with self._lock:
            kept = self._alive(key.digest)
            if kept is not None:
                kept.pinned = pinned
            return kept is not None

    def contains(self, key: EntryKey) -> bool:
        with self._lock:
            return self._alive(key.digest) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        with self._lock:
            infos = list(self._groups.get(key.group, {}).values())
            return [info for info in infos if self._alive(info.key.digest) is not None]

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        with self._lock:
            keys = [kept.entry.key for kept in self._kept.values()]
        return iter([key for key in keys if namespace in (None, key.namespace)])

    def stats(self, namespace: str | None = None) -> StoreStats:
        with self._lock:
            entries = len(list(self.keys(namespace)))
            if namespace is None:
                counts = self._usage.total(), self._hits.total(), self._misses.total()
            else:
                counts = self._usage[namespace], self._hits[namespace], self._misses[namespace]
            return StoreStats(entries, *counts, self._evicted)

    def check(self, fix: bool = False) -> list[Problem]:
        with self._lock:
            counted: Counter[str] = Counter()
            for kept in self._kept.values():
                counted[kept.entry.key.namespace] += kept.entry.nbytes
            wrong = {n for n in {*counted, *self._usage} if counted[n] != self._usage[n]}
            problems = [Problem("counter", f"{n}: {self._usage[n]} for {counted[n]} bytes", fix) for n in sorted(wrong)]
            if fix:
                self._usage = counted
            return problems

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
            self._groups.clear()
            self._usage.clear()
