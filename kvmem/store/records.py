"""Records: documents, memories and conversations, as rows of JSON by namespace, kind and key."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import xxhash

from kvmem.store.base import Problem

logger = logging.getLogger("kvmem")
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        key: unique within its namespace and kind.
        value: a JSON object.
        position: the order in which keys were first put; it stays when a value is replaced.
        revision: larger than that of every earlier write in the database.
    """

    key: str
    value: Mapping[str, Any]
    position: int
    revision: int


@dataclass(frozen=True)
class Head:
    """The state of a kind: the revision of its last change, and how many records it has."""

    revision: int = 0
    count: int = 0


class Records(Protocol):
    """The records of one kind in one namespace. Every method may be called from any thread.

    Each method raises StoreError when the database fails; nothing has changed then. A damaged record is logged and
    treated as missing; `put` replaces it.
    """

    def get(self, key: str) -> Record | None:
        """The record, or None."""

    def scan(self, prefix: str = "") -> list[Record]:
        """The records whose keys begin with `prefix`, by position."""

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, by position; values are not read."""

    def since(self, revision: int) -> list[Record]:
        """The records that were put after `revision`, by position. Deletions show in `head` only."""

    def head(self) -> Head:
        """Revision and count. A change by any process changes the revision."""

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a record, durable on return (outside a transaction). Replaces one of the same key."""

    def delete(self, key: str) -> bool:
        """Remove a record; False when there is none."""

    def clear(self, prefix: str = "") -> int:
        """Remove the records whose keys begin with `prefix`; returns how many."""


class Database(Protocol):
    """All records of a store.

    transactional: whether a failed transaction is undone, and transactions of other processes wait for each other.
    """

    transactional: bool

    def records(self, namespace: str, kind: str) -> Records:
        """The records of one kind. Nothing is created until the first `put`."""

    def kinds(self, namespace: str, prefix: str = "") -> list[str]:
        """The kinds that begin with `prefix` and have records, in alphabetical order."""

    def transaction(self) -> AbstractContextManager[None]:
        """Inside, this thread alone writes; an exception undoes everything. Transactions may be nested.

        Where the database is not `transactional`, only threads of this process wait, and nothing is undone.
        """

    def forget(self, namespace: str) -> None:
        """Remove every record of a namespace."""

    def check(self, fix: bool = False) -> list[Problem]:
        """Every damaged record; with `fix` it is set aside, so that it is not read again."""

    def shrink(self) -> None:
        """Make sure that nothing removed can be read back from files. Raises StoreError when that fails."""

    def close(self) -> None:
        """Release files. Calling it again does nothing."""


def checksum(namespace: str, kind: str, key: str, text: str) -> str:
    """XXH3-128 of a record, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest("\0".join((namespace, kind, key, text)).encode("utf-8", "surrogatepass")))


def list_key(*parts: Any) -> str:
    """A key made of several parts, such that a list of fewer parts gives a prefix; see `list_prefix`."""
    return json.dumps(list(parts), ensure_ascii=False)


def list_prefix(*parts: Any) -> str:
    """What exactly those keys of `list_key` begin with that have these parts first, and more behind them."""
    return json.dumps(list(parts), ensure_ascii=False)[:-1] + ", "


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


@dataclass
class _Row:
    text: str
    position: int
    revision: int


@dataclass
class _Kind:
    rows: dict[str, _Row] = field(default_factory=dict)
    revision: int = 0


class MemoryDatabase:
    """Records in this process."""

    transactional = True

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._lock = threading.RLock()
        self._clock = 0
        self._undo: list[Callable[[], None]] | None = None

    def records(self, namespace: str, kind: str) -> MemoryRecords:
        return MemoryRecords(self, namespace, kind)

    def kinds(self, namespace: str, prefix: str = "") -> list[str]:
        with self._lock:
            found = [kind for (ns, kind), held in self._kinds.items() if ns == namespace and held.rows]
            return sorted(kind for kind in found if kind.startswith(prefix))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            if self._undo is not None:
                yield
                return
            self._undo = []
            try:
                yield
            except BaseException:
                for undo in reversed(self._undo):
                    undo()
                raise
            finally:
                self._undo = None

    def forget(self, namespace: str) -> None:
        with self._lock:
            for kind in self.kinds(namespace):
                self.records(namespace, kind).clear()

    def check(self, fix: bool = False) -> list[Problem]:
        """Nothing can be damaged."""
        return []

    def shrink(self) -> None:
        """Nothing is in files."""

    def close(self) -> None:
        """Nothing is held open; records end with the process."""

    def _change(self, name: tuple[str, str], key: str, row: _Row | None) -> None:
        """Set or remove a row. For the holder of the lock."""
        kind = self._kinds.setdefault(name, _Kind())
        old = kind.rows.get(key)
        if self._undo is not None:
            self._undo.append(lambda: self._set(kind, key, old))
        self._set(kind, key, row)

    def _set(self, kind: _Kind, key: str, row: _Row | None) -> None:
        if row is None:
            kind.rows.pop(key, None)
        else:
            kind.rows[key] = row
        kind.revision = self._tick()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class MemoryRecords:
    """See `Records`."""

    def __init__(self, database: MemoryDatabase, namespace: str, kind: str) -> None:
        self._database, self._name = database, (namespace, kind)

    def _rows(self) -> dict[str, _Row]:
        held = self._database._kinds.get(self._name)
        return {} if held is None else held.rows

    def get(self, key: str) -> Record | None:
        with self._database._lock:
            row = self._rows().get(key)
            return None if row is None else _record(key, row)

    def scan(self, prefix: str = "") -> list[Record]:
        return self._chosen(lambda key, _: key.startswith(prefix))

    def keys(self, prefix: str = "") -> list[str]:
        with self._database._lock:
            rows = sorted(self._rows().items(), key=lambda pair: pair[1].position)
            return [key for key, _ in rows if key.startswith(prefix)]

    def since(self, revision: int) -> list[Record]:
        return self._chosen(lambda _, row: row.revision > revision)

    def _chosen(self, wanted: Callable[[str, _Row], bool]) -> list[Record]:
        with self._database._lock:
            rows = sorted(self._rows().items(), key=lambda pair: pair[1].position)
            return [_record(key, row) for key, row in rows if wanted(key, row)]

    def head(self) -> Head:
        with self._database._lock:
            held = self._database._kinds.get(self._name)
            return Head() if held is None else Head(held.revision, len(held.rows))

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(dict(value))
        with self._database._lock:
            old, now = self._rows().get(key), self._database._tick()
            position = now if old is None else old.position
            self._database._change(self._name, key, _Row(text, position, now))

    def delete(self, key: str) -> bool:
        with self._database._lock:
            if key not in self._rows():
                return False
            self._database._change(self._name, key, None)
            return True

    def clear(self, prefix: str = "") -> int:
        with self._database._lock:
            keys = self.keys(prefix)
            for key in keys:
                self._database._change(self._name, key, None)
            return len(keys)


def _record(key: str, row: _Row) -> Record:
    return Record(key, json.loads(row.text), row.position, row.revision)


def parse_row(namespace: str, kind: str, key: str, text: Any, found: Any) -> Mapping[str, Any] | None:
    """The value of a row if it is what was written, else None, and a warning."""
    if isinstance(text, str) and checksum(namespace, kind, key, text) == found:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    logger.warning(
        "kvmem: the %s %r in namespace %r is damaged, and is left out. Run `kvmem doctor --fix` to set it aside.",
        kind.partition(":")[0],
        key[:100],
        namespace,
    )
    return None


def in_order(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.position)


def next_revision(last: int) -> int:
    """A revision for a database without a counter: nanoseconds since 1970, and always more than `last`."""
    return max(last + 1, time.time_ns())
