"""Compare entry files with their rows, and tell what is wrong with a store."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import suppress
from pathlib import Path

from kvmem.errors import StoreError
from kvmem.store.base import Problem
from kvmem.store.codec import DamagedEntryError, decode, key_of
from kvmem.store.entry_index import EntryIndex
from kvmem.store.files import EntryFiles, verify_file
from kvmem.store.rebuild import is_readable

logger = logging.getLogger("kvmem")


def check_entries(index: EntryIndex, files: EntryFiles, fix: bool) -> tuple[list[Problem], list[str]]:
    """Every file or row that is not as it should be, and with `fix` the files to unlink, whose rows are gone."""
    # Listed before the index is read, so that files written in the meantime do not look like orphans.
    found = files.all()
    doomed: list[str] = []
    if is_unlisted(index, files):
        # The files are all that is left of what was computed.
        where = f"{len(found)} files; run `kvmem doctor --rebuild`, or delete the directory to start over"
        return [Problem("not in the index", where, False)], []
    with index.transaction() as connection:
        problems = []
        names = {row["name"] for row in index.pending(connection)}
        for row in connection.execute("SELECT * FROM entries").fetchall():
            names.add(row["name"])
            if (problem := _inspect(files, row)) is not None:
                problems.append(Problem(*problem, fix))
                doomed += index.doom(connection, "digest = ?", row["digest"]) if fix else []
        abandoned = sorted(row["name"] for row in index.abandoned(connection))
        problems += [Problem("temporary", name, fix) for name in abandoned]
        doomed += abandoned if fix else []
    for path in found:
        if path.name.removesuffix(".safetensors") not in names and path.exists():
            if fix:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            problems.append(Problem("orphan", str(path), fix and not path.exists()))
    return problems, doomed


def is_unlisted(index: EntryIndex, files: EntryFiles) -> bool:
    """Whether there are entry files, but none is in the index: it was deleted, or emptied."""
    if index.totals(None)[0] or not files.has_any():
        return False
    with index.transaction() as connection:
        rows = connection.execute("SELECT EXISTS (SELECT 1 FROM entries) OR EXISTS (SELECT 1 FROM pending)")
        return not rows.fetchone()[0]


def warn_if_unlisted(index: EntryIndex, files: EntryFiles, directory: Path) -> None:
    if is_unlisted(index, files):
        logger.warning(
            "kvmem: the store in %s has entry files that its index does not list, so nothing is reused. "
            "Run `kvmem doctor --rebuild --store %s`.",
            directory,
            directory,
        )


def unusable(directory: Path, index: Path, error: Exception) -> StoreError:
    """What to do about a store that cannot be opened."""
    if not is_readable(index):
        return StoreError(
            f"{index} is damaged: {error}. Run `kvmem doctor --rebuild --store {directory}`, which lists the entry "
            "files again."
        )
    return StoreError(
        f"The store directory {str(directory)!r} cannot be used: {error}. "
        "Use a directory that is writable or can be created."
    )


def _inspect(files: EntryFiles, row: sqlite3.Row) -> tuple[str, str] | None:
    """The problem with the file of a row and its location; None if there is none."""
    path = files.path(row["name"])
    try:
        verify_file(path, row["size"], row["checksum"])
        decode(path, key_of(row))
    except FileNotFoundError:
        return "missing", str(path)
    except (DamagedEntryError, OSError) as error:
        return "damaged", f"{path}: {error}"
    return None
