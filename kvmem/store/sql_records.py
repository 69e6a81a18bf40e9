"""SqlDatabase: records in one SQLite file that several threads and processes may use."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmem.errors import InputError, StoreError
from kvmem.store.base import Problem
from kvmem.store.index import Index
from kvmem.store.records import Head, Record, checksum, parse_row

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    position INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
    revision INTEGER NOT NULL, value TEXT NOT NULL, checksum TEXT NOT NULL, UNIQUE (namespace, kind, key)
);
CREATE INDEX IF NOT EXISTS by_position ON records (namespace, kind, position);
CREATE INDEX IF NOT EXISTS by_revision ON records (namespace, kind, revision);
-- What has changed, and when: readers keep what they have parsed while the head of a kind stays the same.
CREATE TABLE IF NOT EXISTS heads (namespace TEXT NOT NULL, kind TEXT NOT NULL, revision INTEGER NOT NULL,
    count INTEGER NOT NULL, PRIMARY KEY (namespace, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL);
INSERT OR IGNORE INTO clock VALUES (1, 0);
-- Damaged records that were set aside.
CREATE TABLE IF NOT EXISTS damaged (namespace TEXT, kind TEXT, key TEXT, value, checksum TEXT);
"""


class SqlDatabase:
    """Records as rows, found by index. See `kvmem.store.records.Database`."""

    transactional = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = Index(path, _SCHEMA)

    def records(self, namespace: str, kind: str) -> SqlRecords:
        return SqlRecords(self, namespace, kind)

    def open(self) -> None:
        """Create the file if there is none. Raises OSError, sqlite3.Error, and StoreError for a damaged file."""
        try:
            self._index.query("SELECT 1 FROM records LIMIT 1")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise _explanation(self._path, error) from error

    def kinds(self, namespace: str, prefix: str = "") -> list[str]:
        rows = self.query("SELECT kind FROM heads WHERE namespace = ? AND count > 0 ORDER BY kind", (namespace,))
        return [row["kind"] for row in rows if row["kind"].startswith(prefix)]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self.writing():
            yield

    def namespaces(self) -> list[str]:
        """The namespaces that have records, in alphabetical order."""
        return [row["namespace"] for row in self.query("SELECT DISTINCT namespace FROM records ORDER BY namespace")]

    def forget(self, namespace: str) -> None:
        with self.writing() as connection:
            connection.execute("DELETE FROM records WHERE namespace = ?", (namespace,))
            connection.execute("DELETE FROM heads WHERE namespace = ?", (namespace,))
            connection.execute("DELETE FROM damaged WHERE namespace = ?", (namespace,))

    def check(self, fix: bool = False) -> list[Problem]:
        problems = []
        with self.writing() as connection:
            for row in connection.execute("SELECT * FROM records").fetchall():
                text = row["value"]
                if isinstance(text, str) and row["checksum"] == checksum(
                    row["namespace"], row["kind"], row["key"], text
                ):
                    continue
                where = f"{row['kind'].partition(':')[0]} {row['key']!r} of namespace {row['namespace']!r}"
                problems.append(Problem("damaged record", where, fix))
                if fix:
                    fields = (row["namespace"], row["kind"], row["key"], text, row["checksum"])
                    connection.execute("INSERT INTO damaged VALUES (?, ?, ?, ?, ?)", fields)
                    connection.execute("DELETE FROM records WHERE position = ?", (row["position"],))
                    _change_head(connection, row["namespace"], row["kind"], -1)
        return problems

    def shrink(self) -> None:
        with _explained(self._path):
            self._index.shrink()

    def close(self) -> None:
        self._index.close()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Raises StoreError."""
        with _explained(self._path):
            return self._index.query(sql, values)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction. Raises StoreError."""
        with _explained(self._path), self._index.transaction() as connection:
            yield connection


class SqlRecords:
    """See `kvmem.store.records.Records`."""

    def __init__(self, database: SqlDatabase, namespace: str, kind: str) -> None:
        self._database, self._name = database, (namespace, kind)

    def get(self, key: str) -> Record | None:
        found = self._parsed("key = ?", (key,))
        return found[0] if found else None

    def scan(self, prefix: str = "") -> list[Record]:
        return self._parsed(*_range(prefix))

    def keys(self, prefix: str = "") -> list[str]:
        where, values = _range(prefix)
        sql = f"SELECT key FROM records WHERE namespace = ? AND kind = ? AND {where} ORDER BY position"  # noqa: S608
        return [row["key"] for row in self._database.query(sql, (*self._name, *values))]

    def since(self, revision: int) -> list[Record]:
        return self._parsed("revision > ?", (revision,))

    def head(self) -> Head:
        sql = "SELECT revision, count FROM heads WHERE namespace = ? AND kind = ?"
        rows = self._database.query(sql, self._name)
        return Head(rows[0]["revision"], rows[0]["count"]) if rows else Head()

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(dict(value))
        with self._database.writing() as connection:
            there = connection.execute(
                "SELECT 1 FROM records WHERE namespace = ? AND kind = ? AND key = ?", (*self._name, key)
            ).fetchone()
            revision = _change_head(connection, *self._name, 0 if there else 1)
            connection.execute(
                "INSERT INTO records (namespace, kind, key, revision, value, checksum) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (namespace, kind, key) DO UPDATE SET revision = excluded.revision, "
                "value = excluded.value, checksum = excluded.checksum",
                (*self._name, key, revision, text, checksum(*self._name, key, text)),
            )

    def delete(self, key: str) -> bool:
        return bool(self._delete("key = ?", (key,)))

    def clear(self, prefix: str = "") -> int:
        return self._delete(*_range(prefix))

    def _delete(self, where: str, values: Sequence[Any]) -> int:
        sql = f"DELETE FROM records WHERE namespace = ? AND kind = ? AND {where}"  # noqa: S608
        with self._database.writing() as connection:
            removed = connection.execute(sql, (*self._name, *values)).rowcount
            if removed:
                _change_head(connection, *self._name, -removed)
        return int(removed)

    def _parsed(self, where: str, values: Sequence[Any]) -> list[Record]:
        sql = f"SELECT * FROM records WHERE namespace = ? AND kind = ? AND {where} ORDER BY position"  # noqa: S608
        found = []
        for row in self._database.query(sql, (*self._name, *values)):
            value = parse_row(*self._name, row["key"], row["value"], row["checksum"])
            if value is not None:
                found.append(Record(row["key"], value, row["position"], row["revision"]))
        return found


def _range(prefix: str) -> tuple[str, tuple[str, ...]]:
    """A condition on `key` that the index answers."""
    if not prefix:
        return "1", ()
    # Keys are compared as UTF-8, where nothing is larger than the last code point.
    return "key >= ? AND key < ?", (prefix, prefix + "\U0010ffff")


def _change_head(connection: sqlite3.Connection, namespace: str, kind: str, added: int) -> int:
    """Count a change of a kind; returns its revision, which no other change has."""
    (revision,) = connection.execute("UPDATE clock SET revision = revision + 1 RETURNING revision").fetchone()
    connection.execute(
        "INSERT INTO heads VALUES (?, ?, ?, MAX(0, ?)) ON CONFLICT (namespace, kind) "
        "DO UPDATE SET revision = excluded.revision, count = MAX(0, count + ?)",
        (namespace, kind, revision, added, added),
    )
    return int(revision)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise InputError(f"A name has characters that cannot be stored: {error}. Remove lone surrogates.") from None
    except (sqlite3.DatabaseError, OSError, UnicodeDecodeError) as error:
        raise _explanation(path, error) from error


def _explanation(path: Path, error: Exception) -> StoreError:
    if isinstance(error, sqlite3.OperationalError | OSError):
        advice = "Free disk space, or check the permissions of the directory"
    else:
        advice = "The file is damaged: move it away, and restore it from a backup or with `kvmem import`"
    return StoreError(
        f"The records in {str(path)!r} cannot be read or written: {error}. {advice}. Nothing was changed."
    )
