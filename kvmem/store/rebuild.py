"""Rebuild the index of a store from its entry files."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import xxhash

from kvmem.errors import StoreError
from kvmem.kv.entry import FORMAT_VERSION
from kvmem.store.codec import DamagedEntryError, decode
from kvmem.store.entry_index import EntryIndex
from kvmem.store.files import EntryFiles


def rebuild_index(directory: Path) -> tuple[int, int]:
    """Add a row for every entry file that has none. An index that cannot be read is set aside first.

    No other process may use the store. Documents, memories and conversations are in another file, and stay.

    Returns:
        How many entries were added, and how many files are damaged. Those stay, for `DiskStore.check` to remove.

    Raises:
        StoreError: The directory cannot be read or written.
    """
    root = directory / f"v{FORMAT_VERSION}"
    try:
        _set_aside(root / "index.sqlite")
        index, files = EntryIndex(root / "index.sqlite"), EntryFiles(root)
        try:
            return _add_missing(index, files)
        finally:
            index.sql.close()
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"The index in {str(root)!r} cannot be rebuilt: {error}. Check its permissions.") from error


def is_readable(path: Path) -> bool:
    """Whether a SQLite file passes SQLite's own check, or is not there."""
    if not path.exists():
        return True
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return False


def _set_aside(path: Path) -> None:
    if is_readable(path):
        return
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        found = path.with_name(name)
        if found.exists():
            found.rename(path.with_name(f"damaged-{int(time.time())}-{name}"))


def _add_missing(index: EntryIndex, files: EntryFiles) -> tuple[int, int]:
    added = damaged = 0
    known = {files.path(str(row["name"])) for row in index.sql.query("SELECT name FROM entries")}
    for path in files.all():
        if path in known or path.suffix != ".safetensors":
            continue
        try:
            entry = decode(path, None)
        except (DamagedEntryError, OSError):
            damaged += 1
            continue
        data = path.read_bytes()
        added += index.admit(entry, path.stem, len(data), xxhash.xxh3_128_hexdigest(data), None)
    return added, damaged
