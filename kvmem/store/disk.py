"""DiskStore: one safetensors file per entry, and an SQLite index of them."""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import xxhash

from kvmem.errors import InputError, StoreError
from kvmem.kv.entry import FORMAT_VERSION, EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, StoreStats
from kvmem.store.codec import DamagedEntryError, KVDtype, check_kv_dtype, decode, encode
from kvmem.store.entry_index import EntryIndex, choose_victims
from kvmem.store.files import EntryFiles, verify_file
from kvmem.store.limits import Limits, Policy
from kvmem.store.migrate import migrate_index
from kvmem.store.sql_records import SqlDatabase
from kvmem.store.upkeep import check_entries, unusable, warn_if_unlisted

logger = logging.getLogger("kvmem")

Verify = Literal["first", "always", "never"]
_FAILURES = (OSError, sqlite3.Error)
T = TypeVar("T")


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
        self._index = EntryIndex(root / "index.sqlite")
        self._database = SqlDatabase(self.directory / "records.sqlite")
        # Checksums that this process has verified, by file.
        self._verified: dict[str, str] = {}
        self._evicted = 0
        self._failing = False
        self._stuck: set[str] = set()
        try:
            self._files.create()
            self._index.totals("")
            self._database.open()
            migrate_index(self._index.sql, self._database)
        except _FAILURES as error:
            raise unusable(self.directory, root / "index.sqlite", error) from error
        warn_if_unlisted(self._index, self._files, self.directory)

    @property
    def database(self) -> SqlDatabase:
        return self._database

    def get(self, key: EntryKey) -> KVEntry | None:
        entry = self._load(key)
        self._index.count(key, hit=entry is not None)
        return entry

    def _load(self, key: EntryKey) -> KVEntry | None:
        row = self._row(key.digest)
        if row is None:
            return None
        path = self._files.path(row["name"])
        try:
            if self.verify == "always" or (
                self.verify == "first" and self._verified.get(row["name"]) != row["checksum"]
            ):
                verify_file(path, row["size"], row["checksum"])
                self._verified[row["name"]] = row["checksum"]
            return replace(decode(path, key), expires=row["expires"])
        except (DamagedEntryError, FileNotFoundError) as error:
            # If another process has just evicted the entry, its row is gone too and nothing is wrong.
            if self._forget("digest = ? AND checksum = ?", key.digest, row["checksum"]):
                logger.warning("kvmem: %s is damaged (%s); it was removed and will be recomputed", path, error)
        except OSError as error:
            self._failed("read", error)
        return None

    def _row(self, digest: str) -> sqlite3.Row | None:
        return self._asked(lambda: self._index.row(digest), None)

    def _asked(self, ask: Callable[[], T], otherwise: T) -> T:
        """What the index says; `otherwise` if it fails."""
        try:
            return ask()
        except _FAILURES as error:
            self._failed("read", error)
            return otherwise

    def contains(self, key: EntryKey) -> bool:
        return self._row(key.digest) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        return self._asked(lambda: self._index.find(key.group), [])

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        none: list[EntryKey] = []
        return iter(self._asked(lambda: self._index.keys(namespace), none))

    def stats(self, namespace: str | None = None) -> StoreStats:
        entries, size = self._asked(lambda: self._index.totals(namespace), (0, 0))
        hits, misses = self._asked(lambda: self._index.uses(namespace), (0, 0))
        return StoreStats(entries, size, hits, misses, self._evicted)

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
                self._index.flush_uses(connection)
                abandoned = self._index.abandoned(connection)
                doomed = [row["name"] for row in abandoned if row["name"] not in self._stuck]
                doomed += self._index.doom(connection, "expires <= ?", time.time())
                victims = choose_victims(connection, self.limits, namespace, size)
                evicted: list[str] = []
                if victims is None:
                    logger.warning("kvmem: an entry of %d bytes is not stored: no entry can be evicted for it", size)
                elif not victims and not doomed:
                    self._index.reserve(connection, name, namespace, size)
                    return True
                for digest in victims or ():
                    evicted += self._index.doom(connection, "digest = ?", digest)
                    self._evicted += 1
            left = self._unlink([*doomed, *evicted])
            if victims is None or not left.isdisjoint(evicted):
                return False

    def _admit(self, entry: KVEntry, name: str, data: bytes) -> None:
        """Add the index row of a written file. If another writer was first, remove the file."""
        checksum = xxhash.xxh3_128_hexdigest(data)
        if self._index.admit(entry, name, len(data), checksum, self.limits.ttl):
            self._verified[name] = checksum
        else:
            self._unlink([name])

    def _unlink(self, names: Sequence[str]) -> set[str]:
        """Remove files that have no row. Returns those that cannot be removed; they stay pending and counted."""
        if not names:
            return set()
        gone = {name for name in names if self._files.remove(name)}
        for name in gone:
            self._verified.pop(name, None)
        with suppress(*_FAILURES):
            self._index.settle(gone)
        left = set(names) - gone
        if new := left - self._stuck:
            logger.warning(
                "kvmem: %d files under %s cannot be removed. Check their permissions, then run `kvmem doctor --fix`.",
                len(new),
                self.directory,
            )
            self._stuck |= new
        return left

    def delete(self, key: EntryKey) -> bool:
        return self._forget("digest = ?", key.digest) > 0

    def clear(self, namespace: str) -> int:
        return self._forget("namespace = ?", namespace)

    def scrub(self, namespace: str) -> None:
        try:
            with self._index.transaction() as connection:
                mine = [row for row in self._index.pending(connection) if row["pid"] == os.getpid()]
                doomed = [*self._index.abandoned(connection), *mine]
            self._unlink([row["name"] for row in doomed if row["namespace"] == namespace])
            self._index.forget_uses(namespace)
            if left := self._index.files_of(namespace):
                raise OSError(f"{left} files could not be removed")
            self._index.sql.shrink()
            self._database.shrink()
        except _FAILURES as error:
            raise StoreError(
                f"Removed data may still be readable in {str(self.directory)!r}: {error}. Close other processes "
                "that use the store, and try again."
            ) from error

    def _forget(self, where: str, *values: object) -> int:
        """Remove entries and return their number."""
        try:
            with self._index.transaction() as connection:
                names = self._index.doom(connection, where, *values)
            self._unlink(names)
        except _FAILURES as error:
            self._failed("write", error)
            return 0
        return len(names)

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        try:
            return self._index.pin(key, pinned)
        except _FAILURES as error:
            self._failed("write", error)
            return False

    def _failed(self, what: str, error: Exception) -> None:
        """Log one warning until a write succeeds again."""
        if not self._failing:
            logger.warning("kvmem: the store at %s cannot %s (%s); texts are recomputed", self.directory, what, error)
        self._failing = True

    def check(self, fix: bool = False) -> list[Problem]:
        problems, doomed = check_entries(self._index, self._files, fix)
        left = self._unlink(doomed)
        problems += self._database.check(fix)
        return [replace(p, fixed=p.fixed and not any(name in p.where for name in left)) for p in problems]

    def close(self) -> None:
        with suppress(*_FAILURES):
            if self._index.has_unwritten_uses:
                with self._index.transaction() as connection:
                    self._index.flush_uses(connection)
        self._index.sql.close()
        self._database.close()
