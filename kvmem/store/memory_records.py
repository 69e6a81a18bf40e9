"""MemoryDatabase: records in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvmem.store.base import Problem
from kvmem.store.records import Head, Record


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
