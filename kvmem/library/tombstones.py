"""Tombstones: which caches a removal has to delete, so that it can be completed if the process is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from uuid import uuid4

from kvmem.kv.entry import EntryKey
from kvmem.store.base import Problem, Store
from kvmem.store.records import Database, Record

KIND = "removed"
# The kind of the records that name the spans of conversations.
THREAD_SPAN = "thread-span"
# Seconds during which a running process may still write caches of text that was removed.
_LATE = 600.0


class Tombstones:
    """Digests of removed spans, by fingerprint of the model. The text cannot be recovered from them.

    If a removal fails after its tombstone was written, the text is still there and its caches may be deleted; they are
    computed again when they are needed.
    """

    def __init__(self, database: Database, namespace: str, clock: Callable[[], float] = time.time) -> None:
        self._records, self._clock = database.records(namespace, KIND), clock

    def put(self, spans: Mapping[str, Iterable[str]]) -> str | None:
        """Record spans before, or in, the transaction that removes their text. Returns a key for `finish`."""
        wanted = {fingerprint: sorted(set(digests)) for fingerprint, digests in spans.items()}
        if not any(wanted.values()):
            return None
        key = uuid4().hex
        self._records.put(key, {"spans": wanted, "at": self._clock()})
        return key

    def finish(self, key: str | None, used: Collection[str]) -> None:
        """A removal is complete. used: digests of spans that were spared, because other text has them."""
        record = None if key is None else self._records.get(key)
        if record is not None and used:
            self._keep(record, lambda _, digest: digest not in used)

    def revive(self, spans: Mapping[str, Iterable[str]]) -> None:
        """The text of these spans was added again."""
        if self._records.head().count:
            used = {(fingerprint, digest) for fingerprint, digests in spans.items() for digest in digests}
            for record in self._records.scan():
                self._keep(record, lambda fingerprint, digest: (fingerprint, digest) not in used)

    def _keep(self, record: Record, wanted: Callable[[str, str], bool]) -> None:
        """Keep some of the spans of a tombstone, and delete it if there are none."""
        spans: Mapping[str, list[str]] = record.value["spans"]
        kept = {name: [digest for digest in digests if wanted(name, digest)] for name, digests in spans.items()}
        if not any(kept.values()):
            self._records.delete(record.key)
        elif kept != spans:
            self._records.put(record.key, {**record.value, "spans": kept})

    def settle(self, delete: Callable[[Mapping[str, Iterable[str]]], None]) -> None:
        """Delete the caches that are still there, and tombstones once no process can still write such caches."""
        for record in self._records.scan():
            delete(record.value["spans"])
            if self._clock() - record.value["at"] > _LATE:
                self._records.delete(record.key)


def digest_of(key: str) -> str:
    """The digest of a conversation's span, from the key of its record."""
    return str(json.loads(key)[2])


def check_removed(store: Store, namespaces: Iterable[str], fix: bool) -> list[Problem]:
    """The caches of removed text that are still in a store; with `fix` they are deleted."""
    problems = []
    for namespace in namespaces:
        records = store.database.records(namespace, KIND)
        used = {digest_of(key) for key in store.database.records(namespace, THREAD_SPAN).keys()}  # noqa: SIM118
        found = [key for record in records.scan() for key in _keys(store, namespace, record)]
        keys = [key for key in found if key.tokens not in used]
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
