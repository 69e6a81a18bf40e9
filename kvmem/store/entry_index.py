"""EntryIndex: what a `DiskStore` knows of its entry files, as rows."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmem.kv.entry import EntryInfo, EntryKey, KVEntry
from kvmem.store.codec import key_of
from kvmem.store.index import ENTRIES, Index
from kvmem.store.limits import Limits

# A process that takes longer than this for one file is assumed to be dead.
_ABANDONED_SECONDS = 600.0
_FRESH = "(expires IS NULL OR expires > ?)"


class EntryIndex:
    """Entries, files in progress ("pending"), and how often entries were used.

    Methods that take a connection belong into a `transaction`. Raises sqlite3.Error and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._index = Index(path, ENTRIES)
        self._lock = threading.Lock()
        self._touched: dict[str, tuple[float, int]] = {}
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()

    @property
    def sql(self) -> Index:
        """The database."""
        return self._index

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Inside, no other thread or process writes. An exception undoes everything."""
        with self._index.transaction() as connection:
            yield connection

    # Reading

    def row(self, digest: str) -> sqlite3.Row | None:
        """The row of an entry that has not expired."""
        sql = f"SELECT * FROM entries WHERE digest = ? AND {_FRESH}"  # noqa: S608
        rows = self._index.query(sql, (digest, time.time()))
        return rows[0] if rows else None

    def find(self, group: str) -> list[EntryInfo]:
        """The entries of a group: the same tokens in other contexts."""
        sql = f"SELECT * FROM entries WHERE grp = ? AND {_FRESH}"  # noqa: S608
        rows = self._index.query(sql, (group, time.time()))
        return [EntryInfo(key_of(row), row["start"], tuple(json.loads(row["spans"])), row["nbytes"]) for row in rows]

    def keys(self, namespace: str | None) -> list[EntryKey]:
        """The keys of a namespace, or of all."""
        where, values = _in(namespace)
        sql = f"SELECT * FROM entries WHERE {where} AND {_FRESH}"  # noqa: S608
        return [key_of(row) for row in self._index.query(sql, (*values, time.time()))]

    def totals(self, namespace: str | None) -> tuple[int, int]:
        """The number of entries, and their size in bytes."""
        where, values = _in(namespace)
        sql = f"SELECT COUNT(*) AS n, TOTAL(size) AS b FROM entries WHERE {where} AND {_FRESH}"  # noqa: S608
        row = self._index.query(sql, (*values, time.time()))[0]
        return int(row["n"]), int(row["b"])

    # Uses

    def count(self, key: EntryKey, hit: bool) -> None:
        """Count a use or a miss. It is written with the next transaction that calls `flush_uses`."""
        with self._lock:
            (self._hits if hit else self._misses)[key.namespace] += 1
            if hit:
                _, uses = self._touched.get(key.digest, (0.0, 0))
                self._touched[key.digest] = (time.time(), uses + 1)

    def uses(self, namespace: str | None) -> tuple[int, int]:
        """Hits and misses, of all processes as far as they are written, and of this one."""
        where, values = _in(namespace)
        row = self._index.query(f"SELECT TOTAL(hits) AS h, TOTAL(misses) AS m FROM counters WHERE {where}", values)[0]  # noqa: S608
        with self._lock:
            names = [namespace] if namespace is not None else [*{*self._hits, *self._misses}]
            hits = int(row["h"]) + sum(self._hits[name] for name in names)
            misses = int(row["m"]) + sum(self._misses[name] for name in names)
        return hits, misses

    def flush_uses(self, connection: sqlite3.Connection) -> None:
        """Write what was counted."""
        with self._lock:
            touched, self._touched = self._touched, {}
            counted = [(name, self._hits[name], self._misses[name]) for name in {*self._hits, *self._misses}]
            self._hits.clear()
            self._misses.clear()
        sql = "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT (namespace) "
        sql += "DO UPDATE SET hits = hits + excluded.hits, misses = misses + excluded.misses"
        connection.executemany(sql, counted)
        rows = [(used, uses, digest) for digest, (used, uses) in touched.items()]
        connection.executemany("UPDATE entries SET used = MAX(used, ?), uses = uses + ? WHERE digest = ?", rows)

    @property
    def has_unwritten_uses(self) -> bool:
        """Whether anything was counted since the last `flush_uses`."""
        return bool(self._touched or self._misses)

    def forget_uses(self, namespace: str) -> None:
        """Forget what was counted of a namespace."""
        with self._lock:
            self._hits.pop(namespace, None)
            self._misses.pop(namespace, None)
        with self._index.transaction() as connection:
            connection.execute("DELETE FROM counters WHERE namespace = ?", (namespace,))

    # Writing

    def reserve(self, connection: sqlite3.Connection, name: str, namespace: str, size: int) -> None:
        """List a file that is about to be written or removed as pending."""
        values = (name, namespace, size, os.getpid(), time.time())
        connection.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?, ?)", values)

    def admit(self, entry: KVEntry, name: str, size: int, checksum: str, ttl: float | None) -> bool:
        """Add the row of a written file. False if another writer was first."""
        key, now = entry.key, time.time()
        described = (key.digest, name, key.group, key.namespace, key.fingerprint, key.context, key.tokens, entry.start)
        expires = None if ttl is None else now + ttl
        kept = (json.dumps(entry.spans), entry.nbytes, size, checksum, now, 0, 0, expires)
        with self._index.transaction() as connection:
            sql = "INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            first = connection.execute(sql, (*described, *kept)).rowcount > 0
            if first:
                connection.execute("DELETE FROM pending WHERE name = ?", (name,))
        return first

    def doom(self, connection: sqlite3.Connection, where: str, *values: object) -> list[str]:
        """Delete rows and list their files as pending. Returns the files to unlink after the transaction."""
        sql = f"DELETE FROM entries WHERE {where} RETURNING name, namespace, size"  # noqa: S608
        rows = connection.execute(sql, values).fetchall()
        for row in rows:
            self.reserve(connection, row["name"], row["namespace"], row["size"])
        return [row["name"] for row in rows]

    def abandoned(self, connection: sqlite3.Connection) -> list[sqlite3.Row]:
        """Pending files of processes that no longer run."""
        late = time.time() - _ABANDONED_SECONDS
        return [row for row in self.pending(connection) if row["since"] < late or not _alive(row["pid"])]

    def pending(self, connection: sqlite3.Connection) -> list[sqlite3.Row]:
        """All pending files."""
        return connection.execute("SELECT * FROM pending").fetchall()

    def settle(self, names: set[str]) -> None:
        """Take files that are gone off the list of pending ones."""
        with self._index.transaction() as connection:
            connection.executemany("DELETE FROM pending WHERE name = ?", [(name,) for name in names])

    def files_of(self, namespace: str) -> int:
        """How many files a namespace has, pending ones included."""
        sql = "SELECT name FROM entries WHERE namespace = ? UNION ALL SELECT name FROM pending WHERE namespace = ?"
        return len(self._index.query(sql, (namespace, namespace)))

    def pin(self, key: EntryKey, pinned: bool) -> bool:
        """Protect an entry from eviction. False if there is none."""
        with self._index.transaction() as connection:
            sql = "UPDATE entries SET pinned = ? WHERE digest = ?"
            return connection.execute(sql, (int(pinned), key.digest)).rowcount > 0


def choose_victims(connection: sqlite3.Connection, limits: Limits, namespace: str, size: int) -> list[str] | None:
    """Digests of entries to evict so that `size` more bytes fit; None if not enough can be evicted."""
    order = "uses, used" if limits.policy == "lfu" else "used"
    sql = "SELECT namespace, SUM(size) AS b FROM (SELECT namespace, size FROM entries UNION ALL "
    sql += "SELECT namespace, size FROM pending) GROUP BY namespace"
    usage = {row["namespace"]: int(row["b"]) for row in connection.execute(sql)}
    sql = f"SELECT digest, namespace, size FROM entries WHERE pinned = 0 ORDER BY {order}"  # noqa: S608
    chosen: list[str] = []
    candidates: list[sqlite3.Row] | None = None
    while give_way := limits.victims(usage, namespace, size):
        if candidates is None:
            candidates = connection.execute(sql).fetchall()
        row = next((row for row in candidates if row["namespace"] in give_way), None)
        if row is None:
            return None
        candidates.remove(row)
        chosen.append(row["digest"])
        usage[row["namespace"]] -= row["size"]
    return chosen


def _in(namespace: str | None) -> tuple[str, tuple[str, ...]]:
    """The condition for a namespace, or for all, such that SQLite can use an index."""
    return ("1", ()) if namespace is None else ("namespace = ?", (namespace,))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
