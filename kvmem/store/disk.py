"""DiskStore: one safetensors file per entry, and an SQLite index of them."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import xxhash

from kvmem.errors import InputError, StoreError
from kvmem.kv.entry import FORMAT_VERSION, EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, StoreStats
from kvmem.store.codec import DamagedEntryError, KVDtype, check_kv_dtype, decode, encode, key_of
from kvmem.store.files import EntryFiles, verify_file
from kvmem.store.index import ENTRIES, Index
from kvmem.store.limits import Limits, Policy
from kvmem.store.migrate import migrate
from kvmem.store.sql_records import SqlDatabase

logger = logging.getLogger("kvmem")

Verify = Literal["first", "always", "never"]
_FAILURES = (OSError, sqlite3.Error)
# A process that takes longer than this for one file is assumed to be dead.
_ABANDONED_SECONDS = 600.0


class DiskStore:
    """Keeps entries in a directory, which several processes on one machine may share.

    To share a store between machines, use `FsspecStore`. An entry is on disk when `put` returns: its file is written
    under a temporary name, synced and renamed before its index row is written. On removal, the row is deleted before
    the file. Every file has a unique name, so one process's delete cannot hit another's put. The index also lists
    files in progress, so files left by a killed process count against the limits until they are removed. A file with
    the wrong size or XXH3 checksum is a miss; it is logged and removed.

    If the file system fails (full, read-only, gone), `put` returns False and `get` misses, with one warning until it
    works again.

    Args:
        directory: Where entries and documents are kept; created if missing.
        max_bytes: Maximum total size of the entry files in bytes; None for no limit. All limits also hold while
            several processes write.
        namespace_bytes: Maximum size of each namespace in bytes; None for no limit. See `Limits`.
        policy: "lru" or "lfu": which entries are evicted first.
        ttl: Seconds after which an entry expires; None for never.
        kv_dtype: How keys and values are stored: "native" (as computed), "int8" or "fp8".
        verify: When checksums are verified: the "first" time this process loads an entry, "always" or "never".

    Raises:
        StoreError: The directory cannot be created or opened.
        InputError: Another argument is invalid.

    Example:
        ```python
        store = DiskStore("./kv", max_bytes=20_000_000_000, kv_dtype="int8")
        with KVMem("smollm2", store) as mem:
            mem.add("The rent is 3,200 euros a month.", id="lease")
            print(mem.ask("What is the rent?").text)
        store.close()
        ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        namespace_bytes: int | None = None,
        policy: Policy = "lru",
        ttl: float | None = None,
        kv_dtype: KVDtype = "native",
        verify: Verify = "first",
    ) -> None:
        self.limits = Limits(max_bytes, namespace_bytes, policy, ttl)
        self.kv_dtype = check_kv_dtype(kv_dtype)
        if verify not in ("first", "always", "never"):
            raise InputError(f"verify={verify!r} is unknown. Use 'first', 'always' or 'never'.")
        self.verify = verify
        self.directory = Path(directory).expanduser()
        root = self.directory / f"v{FORMAT_VERSION}"
        self._files = EntryFiles(root)
        self._index = Index(root / "index.sqlite", ENTRIES)
        self._database = SqlDatabase(self.directory / "records.sqlite")
        self._verified: dict[str, str] = {}
        self._touched: dict[str, tuple[float, int]] = {}
        self._hits: Counter[str] = Counter()
        self._evicted = 0
        self._misses: Counter[str] = Counter()
        self._failing = False
        self._stuck: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._files.create()
            self._index.query("SELECT 1 FROM entries LIMIT 1")
            self._database.open()
            self._migrate()
        except _FAILURES as error:
            raise StoreError(
                f"The store directory {str(self.directory)!r} cannot be used: {error}. "
                "Use a directory that is writable or can be created."
            ) from error

    @property
    def database(self) -> SqlDatabase:
        return self._database

    def _migrate(self) -> None:
        """Migrate the records of kvmem 0.1, which were kept in the entry index as texts by name."""
        if not self._index.query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'documents'"):
            return
        rows = self._index.query("SELECT name, text FROM documents")
        understood = migrate([(row["name"], row["text"]) for row in rows], self._database)
        with self._index.transaction() as connection:
            connection.executemany("DELETE FROM documents WHERE name = ?", [(name,) for name in understood])
            if len(understood) == len(rows):
                connection.execute("DROP TABLE documents")

    # Reading

    def get(self, key: EntryKey) -> KVEntry | None:
        entry = self._load(key)
        with self._lock:
            (self._misses if entry is None else self._hits)[key.namespace] += 1
            if entry is not None:
                _, uses = self._touched.get(key.digest, (0.0, 0))
                self._touched[key.digest] = (time.time(), uses + 1)
        return entry

    def _load(self, key: EntryKey) -> KVEntry | None:
        row = self._row(key.digest)
        if row is None:
            return None
        path = self._files.path(row["name"])
        try:
            if self.verify == "always" or (
                self.verify == "first" and self._verified.get(key.digest) != row["checksum"]
            ):
                verify_file(path, row["size"], row["checksum"])
                self._verified[key.digest] = row["checksum"]
            return replace(decode(path, key), expires=row["expires"])
        except (DamagedEntryError, FileNotFoundError) as error:
            # If another process has just evicted the entry, its row is gone too and nothing is wrong.
            if self._forget([key.digest], only=row["checksum"]):
                logger.warning("kvmem: %s is damaged (%s); it was removed and will be recomputed", path, error)
        except OSError as error:
            self._failed("read", error)
        return None

    def _row(self, digest: str) -> sqlite3.Row | None:
        rows = self._rows("SELECT * FROM entries WHERE digest = ? AND (expires IS NULL OR expires > ?)", digest)
        return rows[0] if rows else None

    def _rows(self, sql: str, *values: str) -> list[sqlite3.Row]:
        """Rows of a query whose last parameter is the current time; empty if the index fails."""
        try:
            return self._index.query(sql, (*values, time.time()))
        except _FAILURES as error:
            self._failed("read", error)
            return []

    def contains(self, key: EntryKey) -> bool:
        return self._row(key.digest) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        rows = self._rows("SELECT * FROM entries WHERE grp = ? AND (expires IS NULL OR expires > ?)", key.group)
        return [EntryInfo(key_of(row), row["start"], tuple(json.loads(row["spans"])), row["nbytes"]) for row in rows]

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        if namespace is None:
            rows = self._rows("SELECT * FROM entries WHERE expires IS NULL OR expires > ?")
        else:
            sql = "SELECT * FROM entries WHERE namespace = ? AND (expires IS NULL OR expires > ?)"
            rows = self._rows(sql, namespace)
        return iter([key_of(row) for row in rows])

    def stats(self, namespace: str | None = None) -> StoreStats:
        if namespace is None:
            sql = "SELECT COUNT(*) AS n, TOTAL(size) AS b FROM entries WHERE expires IS NULL OR expires > ?"
            rows, counted = self._rows(sql), self._counters("1 OR ?", "")
        else:
            sql = "SELECT COUNT(*) AS n, TOTAL(size) AS b FROM entries WHERE namespace = ? AND (expires IS NULL OR "
            rows, counted = self._rows(sql + "expires > ?)", namespace), self._counters("namespace = ?", namespace)
        with self._lock:
            names = [namespace] if namespace is not None else [*{*self._hits, *self._misses}]
            hits = counted[0] + sum(self._hits[name] for name in names)
            misses = counted[1] + sum(self._misses[name] for name in names)
        entries, size = (rows[0]["n"], int(rows[0]["b"])) if rows else (0, 0)
        return StoreStats(entries, size, hits, misses, self._evicted)

    def _counters(self, where: str, value: str) -> tuple[int, int]:
        """Hits and misses stored in the index."""
        sql = f"SELECT TOTAL(hits) AS h, TOTAL(misses) AS m FROM counters WHERE {where}"  # noqa: S608
        try:
            row = self._index.query(sql, (value,))[0]
        except _FAILURES as error:
            self._failed("read", error)
            return 0, 0
        return int(row["h"]), int(row["m"])

    # Writing

    def put(self, entry: KVEntry) -> bool:
        try:
            if self.contains(entry.key):
                return True
            data = encode(entry, self.kv_dtype)
            name = f"{entry.key.digest}-{secrets.token_hex(4)}"
            if not self._reserve(entry.key.namespace, name, len(data)):
                return False
            try:
                self._files.write(name, data)
                self._admit(entry, name, data)
            except BaseException:
                self._unlink([name])
                raise
        except _FAILURES as error:
            self._failed("write", error)
            return False
        self._failing = False
        return True

    def _reserve(self, namespace: str, name: str, size: int) -> bool:
        """Reserve space for a file, evicting entries if needed. Returns False if there is not enough."""
        if not self.limits.fits_at_all(size):
            logger.warning(
                "kvmem: an entry of %d bytes exceeds the store's limit (%s). It is not stored, and its text will be "
                "recomputed when needed. Raise the limit, or split documents into smaller chunks.",
                size,
                self.limits,
            )
            return False
        while True:
            with self._index.transaction() as connection:
                self._flush_uses(connection)
                doomed = [row["name"] for row in self._abandoned(connection) if row["name"] not in self._stuck]
                doomed += self._doom(connection, "expires <= ?", time.time())
                victims = self._victims(connection, namespace, size)
                evicted: list[str] = []
                if victims is None:
                    logger.warning("kvmem: an entry of %d bytes is not stored: no entry can be evicted for it", size)
                elif not victims and not doomed:
                    values = (name, namespace, size, os.getpid(), time.time())
                    connection.execute("INSERT INTO pending VALUES (?, ?, ?, ?, ?)", values)
                    return True
                for digest in victims or ():
                    evicted += self._doom(connection, "digest = ?", digest)
                    self._evicted += 1
            left = self._unlink([*doomed, *evicted])
            if victims is None or not left.isdisjoint(evicted):
                return False

    def _victims(self, connection: sqlite3.Connection, namespace: str, size: int) -> list[str] | None:
        """Digests of entries to evict so that `size` more bytes fit; None if not enough can be evicted."""
        order = "uses, used" if self.limits.policy == "lfu" else "used"
        sql = "SELECT namespace, SUM(size) AS b FROM (SELECT namespace, size FROM entries UNION ALL "
        sql += "SELECT namespace, size FROM pending) GROUP BY namespace"
        usage = {row["namespace"]: int(row["b"]) for row in connection.execute(sql)}
        sql = f"SELECT digest, namespace, size FROM entries WHERE pinned = 0 ORDER BY {order}"  # noqa: S608
        chosen: list[str] = []
        candidates: list[sqlite3.Row] | None = None
        while give_way := self.limits.victims(usage, namespace, size):
            if candidates is None:
                candidates = connection.execute(sql).fetchall()
            row = next((row for row in candidates if row["namespace"] in give_way), None)
            if row is None:
                return None
            candidates.remove(row)
            chosen.append(row["digest"])
            usage[row["namespace"]] -= row["size"]
        return chosen

    def _admit(self, entry: KVEntry, name: str, data: bytes) -> None:
        """Add the index row of a written file. If another writer was first, remove the file."""
        key, now, checksum = entry.key, time.time(), xxhash.xxh3_128_hexdigest(data)
        expires = None if self.limits.ttl is None else now + self.limits.ttl
        described = (key.digest, name, key.group, key.namespace, key.fingerprint, key.context, key.tokens, entry.start)
        kept = (json.dumps(entry.spans), entry.nbytes, len(data), checksum, now, 0, 0, expires)
        with self._index.transaction() as connection:
            sql = "INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            first = connection.execute(sql, (*described, *kept)).rowcount > 0
            if first:
                connection.execute("DELETE FROM pending WHERE name = ?", (name,))
        if first:
            self._verified[key.digest] = checksum
        else:
            self._unlink([name])

    def _doom(self, connection: sqlite3.Connection, where: str, *values: object) -> list[str]:
        """Delete rows and list their files as pending. Returns the files to unlink after the transaction."""
        sql = f"DELETE FROM entries WHERE {where} RETURNING digest, name, namespace, size"  # noqa: S608
        rows = connection.execute(sql, values).fetchall()
        for row in rows:
            pending = (row["name"], row["namespace"], row["size"], os.getpid(), time.time())
            connection.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?, ?)", pending)
            self._verified.pop(row["digest"], None)
        return [row["name"] for row in rows]

    def _unlink(self, names: Sequence[str]) -> set[str]:
        """Remove files that have no row. Returns those that cannot be removed; they stay pending and counted."""
        if not names:
            return set()
        gone = {name for name in names if self._files.remove(name)}
        with suppress(*_FAILURES), self._index.transaction() as connection:
            connection.executemany("DELETE FROM pending WHERE name = ?", [(name,) for name in gone])
        left = set(names) - gone
        if new := left - self._stuck:
            logger.warning(
                "kvmem: %d files under %s cannot be removed. Check their permissions, then run `kvmem doctor --fix`.",
                len(new),
                self.directory,
            )
            self._stuck |= new
        return left

    def _abandoned(self, connection: sqlite3.Connection) -> list[sqlite3.Row]:
        """Pending files of processes that no longer run."""
        rows = connection.execute("SELECT * FROM pending").fetchall()
        late = time.time() - _ABANDONED_SECONDS
        return [row for row in rows if row["since"] < late or not _alive(row["pid"])]

    def _flush_uses(self, connection: sqlite3.Connection) -> None:
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

    def delete(self, key: EntryKey) -> bool:
        return bool(self._forget([key.digest]))

    def clear(self, namespace: str) -> int:
        return self._forget(namespace=namespace)

    def scrub(self, namespace: str) -> None:
        with self._lock:
            self._hits.pop(namespace, None)
            self._misses.pop(namespace, None)
        try:
            with self._index.transaction() as connection:
                abandoned = self._abandoned(connection)
                mine = [
                    row for row in connection.execute("SELECT * FROM pending").fetchall() if row["pid"] == os.getpid()
                ]
            self._unlink([row["name"] for row in (*abandoned, *mine) if row["namespace"] == namespace])
            with self._index.transaction() as connection:
                connection.execute("DELETE FROM counters WHERE namespace = ?", (namespace,))
                sql = "SELECT name FROM entries WHERE namespace = ? UNION ALL "
                sql += "SELECT name FROM pending WHERE namespace = ?"
                left = connection.execute(sql, (namespace, namespace)).fetchall()
            if left:
                raise OSError(f"{len(left)} files could not be removed")
            self._index.shrink()
            self._database.shrink()
        except _FAILURES as error:
            raise StoreError(
                f"Removed data may still be readable in {str(self.directory)!r}: {error}. Close other processes "
                "that use the store, and try again."
            ) from error

    def _forget(self, digests: list[str] | None = None, namespace: str = "", only: str | None = None) -> int:
        """Remove entries and return their number. With `only`, remove just the entry with that checksum."""
        names: list[str] = []
        try:
            with self._index.transaction() as connection:
                if digests is None:
                    names += self._doom(connection, "namespace = ?", namespace)
                for digest in digests or ():
                    where, extra = ("digest = ?", ()) if only is None else ("digest = ? AND checksum = ?", (only,))
                    names += self._doom(connection, where, digest, *extra)
            self._unlink(names)
        except _FAILURES as error:
            self._failed("write", error)
            return 0
        return len(names)

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        try:
            with self._index.transaction() as connection:
                sql = "UPDATE entries SET pinned = ? WHERE digest = ?"
                return connection.execute(sql, (int(pinned), key.digest)).rowcount > 0
        except _FAILURES as error:
            self._failed("write", error)
            return False

    def _failed(self, what: str, error: Exception) -> None:
        """Log one warning until a write succeeds again."""
        if not self._failing:
            logger.warning("kvmem: the store at %s cannot %s (%s); texts are recomputed", self.directory, what, error)
        self._failing = True

    # Upkeep

    def check(self, fix: bool = False) -> list[Problem]:
        # Listed before the index is read, so that files written in the meantime do not look like orphans.
        files = self._files.all()
        doomed: list[str] = []
        with self._index.transaction() as connection:
            problems = []
            names = {row["name"] for row in connection.execute("SELECT name FROM pending")}
            for row in connection.execute("SELECT * FROM entries").fetchall():
                names.add(row["name"])
                if (found := self._inspect(row)) is not None:
                    problems.append(Problem(*found, fix))
                    doomed += self._doom(connection, "digest = ?", row["digest"]) if fix else []
            abandoned = sorted(row["name"] for row in self._abandoned(connection))
            problems += [Problem("temporary", name, fix) for name in abandoned]
            doomed += abandoned if fix else []
        for path in files:
            if path.name.removesuffix(".safetensors") not in names and path.exists():
                if fix:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                problems.append(Problem("orphan", str(path), fix and not path.exists()))
        left = self._unlink(doomed)
        problems += self._database.check(fix)
        return [replace(p, fixed=p.fixed and not any(name in p.where for name in left)) for p in problems]

    def _inspect(self, row: sqlite3.Row) -> tuple[str, str] | None:
        """The problem with the file of a row and its location; None if there is none."""
        path = self._files.path(row["name"])
        try:
            verify_file(path, row["size"], row["checksum"])
            decode(path, key_of(row))
        except FileNotFoundError:
            return "missing", str(path)
        except (DamagedEntryError, OSError) as error:
            return "damaged", f"{path}: {error}"
        return None

    def close(self) -> None:
        with suppress(*_FAILURES):
            if self._touched or self._misses:
                with self._index.transaction() as connection:
                    self._flush_uses(connection)
        self._index.close()
        self._database.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
