"""Index: a SQLite database that several threads and processes may use."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ENTRIES = """
CREATE TABLE IF NOT EXISTS entries (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, grp TEXT NOT NULL, namespace TEXT NOT NULL, fingerprint TEXT NOT NULL,
    context TEXT NOT NULL, tokens TEXT NOT NULL, start INTEGER NOT NULL, spans TEXT NOT NULL,
    nbytes INTEGER NOT NULL, size INTEGER NOT NULL, checksum TEXT NOT NULL,
    used REAL NOT NULL, uses INTEGER NOT NULL, pinned INTEGER NOT NULL, expires REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_group ON entries (grp);
CREATE INDEX IF NOT EXISTS by_namespace ON entries (namespace, size);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
-- Files that are about to be written or removed, so that those of a killed process are known.
CREATE TABLE IF NOT EXISTS pending (name TEXT PRIMARY KEY, namespace TEXT NOT NULL, size INTEGER NOT NULL,
    pid INTEGER NOT NULL, since REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counters (namespace TEXT PRIMARY KEY, hits INTEGER NOT NULL, misses INTEGER NOT NULL)
    WITHOUT ROWID;
"""


def _set_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging. SQLite does not wait for others while it changes the mode of a new file, so we do."""
    for attempt in range(200):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if attempt == 199:
                raise
            time.sleep(0.02)


class Index:
    """Rows by SQL. A failed connection is dropped, and opened anew by the next call.

    Raises sqlite3.Error and OSError.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self._path, self._schema = path, schema
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def _connect(self) -> sqlite3.Connection:
        # A connection must not be used across fork.
        if self._connection is None or self._pid != os.getpid():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
            _set_wal(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")
            connection.executescript(self._schema)
            connection.row_factory = sqlite3.Row
            self._connection, self._pid = connection, os.getpid()
        return self._connection

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, self._guarded() as connection:
            return connection.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Inside, no other thread or process writes. An exception undoes everything. May be nested."""
        with self._lock, self._guarded() as connection:
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                with suppress(sqlite3.Error):  # a failed connection is closed, which rolls back too
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def shrink(self) -> None:
        """Write everything to the database file, and nothing that was deleted. Raises sqlite3.OperationalError while
        others are using it."""
        with self._lock, self._guarded() as connection:
            connection.execute("VACUUM")
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("another process is reading the index")

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connect()
        except sqlite3.Error:
            self.close()
            raise

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None
