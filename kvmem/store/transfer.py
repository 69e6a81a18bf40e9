"""Export the records of a store as JSON lines, and import them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvmem.errors import InputError
from kvmem.store.records import Database

_FORMAT = "kvmem-export/1"
# Records that only make sense together with the caches of a store.
_OF_CACHES = frozenset(("branch", "thread-span", "removed"))


def export_records(database: Database, namespaces: Sequence[str]) -> Iterator[str]:
    """Documents, memories, conversations and items of agents' stores, a line of JSON each; caches are not among them.

    Args:
        database: The records.
        namespaces: The namespaces to export.

    Yields:
        Lines without line breaks; the first one names the format.
    """
    yield json.dumps({"format": _FORMAT})
    for namespace in namespaces:
        for kind in database.kinds(namespace):
            if kind in _OF_CACHES:
                continue
            for record in database.records(namespace, kind).scan():
                row = {"namespace": namespace, "kind": kind, "key": record.key, "value": record.value}
                yield json.dumps(row, ensure_ascii=False)


def import_records(database: Database, lines: Iterable[str], namespace: str | None = None) -> int:
    """Put exported records into a store, all or none. Those of the same key are replaced.

    Args:
        database: The records of the store.
        lines: As `export_records` has them.
        namespace: Where to put them; None is where they came from.

    Returns:
        How many records there were.

    Raises:
        InputError: A line is not an exported record.
    """
    count = 0
    with database.transaction():
        for number, line in enumerate(lines, 1):
            row = _parsed(line, number)
            if number == 1:
                if row.get("format") != _FORMAT:
                    raise InputError(f"The first line does not say {_FORMAT!r}. Give a file made by `kvmem export`.")
                continue
            try:
                records = database.records(namespace or row["namespace"], row["kind"])
                records.put(row["key"], dict(row["value"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"Line {number} is not an exported record: {error!r}. Nothing was imported.") from None
            count += 1
    return count


def _parsed(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"Line {number} is not JSON: {error}. Nothing was imported.") from None
    if not isinstance(row, dict):
        raise InputError(f"Line {number} is not an exported record. Nothing was imported.")
    return row
