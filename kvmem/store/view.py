"""RecordView: the records of a kind, parsed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kvmem.store.records import Database, Head, Record

T = TypeVar("T")


class RecordView(Generic[T]):
    """The records of a kind, parsed once and kept up to date; for any thread, but not inside a transaction.

    Records that other processes change or remove are noticed at the next look, which costs one query while nothing has
    changed.

    Args:
        parse: called once for each version of a record.
        changed: called with what was parsed before and now of a record, either of which may be None.
    """

    def __init__(
        self,
        database: Database,
        namespace: str,
        kind: str,
        parse: Callable[[Record], T],
        changed: Callable[[T | None, T | None], None] = lambda old, new: None,
    ) -> None:
        self._database, self._records = database, database.records(namespace, kind)
        self._parse, self._changed = parse, changed
        self._lock = threading.RLock()
        self._head = Head()
        # Records that are there and cannot be parsed: the database counts them, and we do not.
        self._damaged = 0
        self._rows: dict[str, tuple[int, T]] = {}
        self._last = -1
        self._parsed: list[T] | None = []

    def refresh(self) -> None:
        """Parse the records that have changed since the last look."""
        with self._lock:
            self._refresh()

    def all(self) -> list[T]:
        """What was parsed, by position. The list is the same object until a record changes; do not change it."""
        with self._lock:
            self._refresh()
            if self._parsed is None:
                self._parsed = [parsed for _, parsed in self._rows.values()]
            return self._parsed

    def get(self, key: str) -> T | None:
        with self._lock:
            self._refresh()
            found = self._rows.get(key)
            return None if found is None else found[1]

    def delete(self, keys: Sequence[str]) -> None:
        """Delete records, all or none. Other records are not looked at, however many there are.

        Raises KeyError with a key that is not there.
        """
        with self._lock:
            self._refresh()
            with self._database.transaction():
                alone = self._records.head() == self._head
                for key in keys:
                    if not self._records.delete(key):
                        raise KeyError(key)
                head = self._records.head()
            if alone and self._database.transactional and all(key in self._rows for key in keys):
                for key in keys:
                    self._changed(self._rows.pop(key)[1], None)
                self._parsed, self._head = None, head

    def _refresh(self) -> None:
        head = self._records.head()
        if head == self._head:
            return
        # A database without a counter goes back when its newest record is removed.
        seen = self._head.revision if head.revision >= self._head.revision else 0
        self._parsed, moved = None, False
        for record in self._records.since(seen):
            new, old = self._parse(record), self._rows.get(record.key)
            self._changed(None if old is None else old[1], new)
            self._rows[record.key] = record.position, new
            moved = moved or (record.position < self._last if old is None else record.position != old[0])
            self._last = max(self._last, record.position)
        if len(self._rows) + self._damaged != head.count:
            self._drop_missing()
        if moved:
            self._rows = dict(sorted(self._rows.items(), key=lambda item: item[1][0]))
        self._head = head

    def _drop_missing(self) -> None:
        there = set(self._records.keys())
        for key in [key for key in self._rows if key not in there]:
            self._changed(self._rows.pop(key)[1], None)
        self._damaged = len(there) - len(self._rows)

    def release(self) -> None:
        """Forget what is kept in memory."""
        with self._lock:
            for _, parsed in self._rows.values():
                self._changed(parsed, None)
            self._head, self._rows, self._last, self._parsed, self._damaged = Head(), {}, -1, [], 0
