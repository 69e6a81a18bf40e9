"""Tombstones: the caches of what was removed, so that they go even if the process ends before it has deleted them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

from kvmem.kv.entry import EntryKey
from kvmem.store.base import Problem, Store
from kvmem.store.records import Database, Record

KIND = "removed"
# Seconds for which processes that were at work may still write caches of what was removed.
_LATE = 600.0


class Tombstones:
    """Digests of removed spans, by fingerprint of the model. They say nothing of the text.

    Those of text that is there after all, because its removal failed, cost only that it is read again.
    """

    def __init__(self, database: Database, namespace: str, clock: Callable[[], float] = time.time) -> None:
        self._records, self._clock = database.records(namespace, KIND), clock

    def put(self, spans: Mapping[str, Iterable[str]]) -> None:
        """Write down spans, before or in the transaction that removes what they belong to."""
        wanted = {fingerprint: sorted(set(digests)) for fingerprint, digests in spans.items()}
        if any(wanted.values()):
            self._records.put(uuid4().hex, {"spans": wanted, "at": self._clock()})

    def settle(self, delete: Callable[[Mapping[str, Iterable[str]]], None]) -> None:
        """Delete the caches that are still there. A tombstone goes when nobody can write such caches any more."""
        for record in self._records.scan():
            delete(record.value["spans"])
            if self._clock() - record.value["at"] > _LATE:
                self._records.delete(record.key)


def check_removed(store: Store, namespaces: Iterable[str], fix: bool) -> list[Problem]:
    """The caches of removed text that are still in a store; with `fix` they are deleted."""
    problems = []
    for namespace in namespaces:
        records = store.database.records(namespace, KIND)
        keys = [key for record in records.scan() for key in _keys(store, namespace, record)]
        if fix:
            for key in keys:
                store.delete(key)
        if keys:
            problems.append(Problem("removed text", f"{len(keys)} entries in namespace {namespace}", fix))
    return problems


def _keys(store: Store, namespace: str, record: Record) -> list[EntryKey]:
    spans: Mapping[str, list[str]] = record.value["spans"]
    keys = (EntryKey(namespace, fingerprint, "", digest) for fingerprint, found in spans.items() for digest in found)
    return [info.key for key in keys for info in store.find(key)]
