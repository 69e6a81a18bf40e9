"""DiskStore: one safetensors file per entry and an index of them; an entry is on disk when `put` returns."""

from __future__ import annotations

import logging
import mmap
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diskcache
import xxhash

from kvmem.entry import EntryInfo, EntryKey, KVEntry
from kvmem.errors import StoreError
from kvmem.store.base import Problem, StoreStats
from kvmem.store.codec import DamagedEntryError, decode, encode, key_of
from kvmem.store.index import Documents, open_index

logger = logging.getLogger("kvmem")

_INDEX_ERRORS = (sqlite3.Error, diskcache.Timeout, ValueError, TypeError)


class DiskStore:
    """Entries under `directory`, which several processes may share.

    A file is written under a temporary name and synced; then it is renamed and its index row is written, in one
    transaction of the index. A file whose size or XXH3 checksum is not the row's is a miss, is logged, and is
    removed. Each file's checksum is verified the first time this process loads it.

    Raises StoreError when the directory cannot be created or opened.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).expanduser()
        self._verified: dict[str, str] = {}
        self._hits = self._misses = 0
        self._lock = threading.Lock()
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._scratch.mkdir(exist_ok=True)
            self._index = open_index(self.directory / "index")
            self._documents = open_index(self.directory / "documents")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"The store directory {str(self.directory)!r} cannot be used: {error}. "
                "Give a directory that is writable or can be created."
            ) from error

    @property
    def _files(self) -> Path:
        return self.directory / "entries"

    @property
    def _scratch(self) -> Path:
        return self.directory / "tmp"

    def _path(self, digest: str) -> Path:
        return self._files / digest[:2] / f"{digest}.safetensors"

    @property
    def documents(self) -> MutableMapping[str, str]:
        return Documents(self._documents)

    def get(self, key: EntryKey) -> KVEntry | None:
        entry = self._load(key)
        with self._lock:
            self._hits += entry is not None
            self._misses += entry is None
        return entry

    def _load(self, key: EntryKey) -> KVEntry | None:
        row = self._row(key.digest)
        if row is None:
            return None
        path = self._path(key.digest)
        try:
            if self._verified.get(key.digest) != row["checksum"]:
                _verify(path, row)
                self._verified[key.digest] = row["checksum"]
            return decode(path, key)
        except (DamagedEntryError, OSError, KeyError) as error:
            logger.warning("kvmem: %s is not usable (%s); it is removed and will be computed again", path, error)
            self._forget(key.digest, key.group, only=row)
            return None

    def _row(self, digest: str) -> dict[str, Any] | None:
        try:
            row = self._index.get(f"entry:{digest}")
        except _INDEX_ERRORS as error:
            logger.warning("kvmem: the index under %s cannot be read (%s)", self.directory, error)
            return None
        return row if isinstance(row, dict) else None

    def put(self, entry: KVEntry) -> bool:
        digest, group = entry.key.digest, entry.key.group
        data = encode(entry)
        checksum = xxhash.xxh3_128_hexdigest(data)
        row = {
            "namespace": entry.key.namespace,
            "fingerprint": entry.key.fingerprint,
            "context": entry.key.context,
            "tokens": entry.key.tokens,
            "start": entry.start,
            "spans": list(entry.spans),
            "nbytes": entry.nbytes,
            "size": len(data),
            "checksum": checksum,
        }
        try:
            with self._written(data) as scratch, self._index.transact(retry=True):
                # Inside the transaction no other process can write: file and row always belong together.
                if self._row(digest) is not None and self._path(digest).exists():
                    return True
                self._path(digest).parent.mkdir(exist_ok=True)
                os.replace(scratch, self._path(digest))
                _sync_directory(self._path(digest).parent)
                self._index.set(f"entry:{digest}", row)
                members = self._index.get(f"group:{group}") or []
                if digest not in members:
                    self._index.set(f"group:{group}", [*members, digest])
        except (OSError, *_INDEX_ERRORS) as error:
            logger.warning("kvmem: an entry could not be stored under %s (%s)", self.directory, error)
            return False
        self._verified[digest] = checksum
        return True

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """`data` in a synced temporary file, which is gone afterwards unless it was renamed."""
        handle, name = tempfile.mkstemp(dir=self._scratch)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield Path(name)
        finally:
            with suppress(OSError):
                os.unlink(name)

    def delete(self, key: EntryKey) -> bool:
        return self._forget(key.digest, key.group)

    def _forget(self, digest: str, group: str, only: dict[str, Any] | None = None) -> bool:
        """Remove the row and the file; with `only`, unless somebody has replaced that row."""
        try:
            with self._index.transact(retry=True):
                if only is not None and self._row(digest) != only:
                    return False
                found = bool(self._index.delete(f"entry:{digest}"))
                members = [d for d in self._index.get(f"group:{group}") or [] if d != digest]
                if members:
                    self._index.set(f"group:{group}", members)
                else:
                    self._index.delete(f"group:{group}")
                with suppress(OSError):
                    self._path(digest).unlink(missing_ok=True)
        except _INDEX_ERRORS as error:
            logger.warning("kvmem: the index under %s cannot be written (%s)", self.directory, error)
            return False
        self._verified.pop(digest, None)
        return found

    def contains(self, key: EntryKey) -> bool:
        return self._row(key.digest) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        try:
            members = self._index.get(f"group:{key.group}") or []
        except _INDEX_ERRORS as error:
            logger.warning("kvmem: the index under %s cannot be read (%s)", self.directory, error)
            return []
        rows = [self._row(digest) for digest in members]
        return [_info(row) for row in rows if row is not None]

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in self._index.iterkeys():
            if name.startswith("entry:") and (row := self._row(name.removeprefix("entry:"))) is not None:
                yield name.removeprefix("entry:"), row

    def keys(self) -> Iterator[EntryKey]:
        return (key_of(row) for _, row in self._rows())

    def stats(self) -> StoreStats:
        sizes = [row["size"] for _, row in self._rows()]
        return StoreStats(len(sizes), sum(sizes), self._hits, self._misses)

    def check(self, fix: bool = False) -> list[Problem]:
        problems = []
        known = set()
        for digest, row in list(self._rows()):
            path = self._path(digest)
            known.add(path)
            try:
                _verify(path, row)
                decode(path, key_of(row))
            except (DamagedEntryError, OSError, KeyError) as error:
                what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
                problems.append(Problem(what, f"{path}: {error}", fix))
                if fix:
                    self._forget(digest, key_of(row).group)
        strays = [("orphan", p) for p in self._files.rglob("*") if p.is_file() and p not in known]
        strays += [("temporary", p) for p in self._scratch.iterdir()]
        for what, path in strays:
            problems.append(Problem(what, str(path), fix))
            if fix:
                path.unlink(missing_ok=True)
        return problems

    def close(self) -> None:
        self._index.close()
        self._documents.close()


def _info(row: dict[str, Any]) -> EntryInfo:
    return EntryInfo(key_of(row), int(row["start"]), tuple(row["spans"]), int(row["nbytes"]))


def _verify(path: Path, row: dict[str, Any]) -> None:
    """Raise DamagedEntryError unless the file has the size and checksum of its row."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != row["size"]:
            raise DamagedEntryError(f"{size} bytes instead of {row['size']}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if xxhash.xxh3_128_hexdigest(view) != row["checksum"]:
                raise DamagedEntryError("its checksum is wrong")


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
