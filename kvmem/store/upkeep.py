"""Compare entry files with their rows."""

from __future__ import annotations

import sqlite3
from contextlib import suppress

from kvmem.store.base import Problem
from kvmem.store.codec import DamagedEntryError, decode, key_of
from kvmem.store.entry_index import EntryIndex
from kvmem.store.files import EntryFiles, verify_file


def check_entries(index: EntryIndex, files: EntryFiles, fix: bool) -> tuple[list[Problem], list[str]]:
    """Every file or row that is not as it should be, and with `fix` the files to unlink, whose rows are gone."""
    # Listed before the index is read, so that files written in the meantime do not look like orphans.
    found = files.all()
    doomed: list[str] = []
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
