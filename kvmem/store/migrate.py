"""Records from stores of kvmem 0.1, which kept all of them as texts under names made by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

from kvmem.store.index import Index
from kvmem.store.records import Database, list_key

logger = logging.getLogger("kvmem")
Row = tuple[str, str, str, dict[str, Any]]


def migrate_index(index: Index, database: Database) -> None:
    """Migrate the records of kvmem 0.1, which were kept in the entry index as texts by name."""
    if not index.query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'documents'"):
        return
    rows = index.query("SELECT name, text FROM documents")
    understood = migrate([(row["name"], row["text"]) for row in rows], database)
    with index.transaction() as connection:
        connection.executemany("DELETE FROM documents WHERE name = ?", [(name,) for name in understood])
        if len(understood) == len(rows):
            connection.execute("DROP TABLE documents")


def migrate(rows: Iterable[tuple[str, str]], database: Database) -> list[str]:
    """Write old rows (name, text) as records, unless there is one of that key; returns the names that were understood.

    In one transaction. A row that cannot be read is logged and left where it is.
    """
    understood: list[str] = []
    found: list[tuple[float, Row]] = []
    for name, text in rows:
        try:
            found += [(float(order), row) for order, row in _convert(name, json.loads(text))]
            understood.append(name)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("kvmem: the row %r cannot be migrated (%s); it is left where it is", name[:100], error)
    with database.transaction():
        for _, (namespace, kind, key, value) in sorted(found, key=lambda pair: pair[0]):
            records = database.records(namespace, kind)
            if records.get(key) is None:
                records.put(key, value)
    return understood


def _convert(name: str, value: dict[str, Any]) -> Iterator[tuple[float, Row]]:
    """The records of an old row, each with what they are ordered by."""
    word, _, rest = name.partition(":") if not name.startswith("[") else ("document", "", name)
    fields = json.loads(rest)
    namespace = str(fields[0])
    if word == "document":
        yield value.pop("order"), (namespace, "document", fields[1], value)
    elif word == "memory":
        yield value["created"], (namespace, f"memory:{fields[1]}", fields[2], value)
    elif word == "item":
        yield value["order"], (namespace, "item", list_key(fields[1], fields[2]), value)
    elif word == "thread":
        yield from _convert_thread(namespace, fields[1], value)


def _convert_thread(namespace: str, thread: str, value: dict[str, Any]) -> Iterator[tuple[float, Row]]:
    yield 0.0, (namespace, "thread", thread, {"generation": uuid4().hex})
    for number, message in enumerate(value["messages"]):
        yield number, (namespace, "message", list_key(thread, number), message)
    for fingerprint, branches in value["branches"].items():
        for age, branch in enumerate(branches):
            yield -age, (namespace, "branch", list_key(thread, fingerprint, uuid4().hex, 0), branch)
    for fingerprint, digests in value["spans"].items():
        for digest in digests:
            yield 0.0, (namespace, "thread-span", list_key(thread, fingerprint, digest), {})
