"""Records: documents, memories and conversations, as rows of JSON by namespace, kind and key."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from kvmem.store.base import Problem

logger = logging.getLogger("kvmem")


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        key: unique within its namespace and kind.
        value: a JSON object.
        position: the order in which keys were first put; it stays when a value is replaced.
        revision: larger than that of every earlier write in the database.
    """

    key: str
    value: Mapping[str, Any]
    position: int
    revision: int


@dataclass(frozen=True)
class Head:
    """The state of a kind: the revision of its last change, and how many records it has."""

    revision: int = 0
    count: int = 0


class Records(Protocol):
    """The records of one kind in one namespace. Every method may be called from any thread.

    Each method raises StoreError when the database fails; nothing has changed then. A damaged record is logged and
    treated as missing; `put` replaces it.
    """

    def get(self, key: str) -> Record | None:
        """The record, or None."""

    def scan(self, prefix: str = "") -> list[Record]:
        """The records whose keys begin with `prefix`, by position."""

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, by position; values are not read."""

    def since(self, revision: int) -> list[Record]:
        """The records that were put after `revision`, by position. Deletions show in `head` only."""

    def head(self) -> Head:
        """Revision and count. A change by any process changes the revision."""

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a record, durable on return (outside a transaction). Replaces one of the same key."""

    def delete(self, key: str) -> bool:
        """Remove a record; False when there is none."""

    def clear(self, prefix: str = "") -> int:
        """Remove the records whose keys begin with `prefix`; returns how many."""


class Database(Protocol):
    """All records of a store.

    transactional: whether a failed transaction is undone, and transactions of other processes wait for each other.
    """

    transactional: bool

    def records(self, namespace: str, kind: str) -> Records:
        """The records of one kind. Nothing is created until the first `put`."""

    def kinds(self, namespace: str, prefix: str = "") -> list[str]:
        """The kinds that begin with `prefix` and have records, in alphabetical order."""

    def transaction(self) -> AbstractContextManager[None]:
        """Inside, this thread alone writes; an exception undoes everything. Transactions may be nested.

        Where the database is not `transactional`, only threads of this process wait, and nothing is undone.
        """

    def forget(self, namespace: str) -> None:
        """Remove every record of a namespace."""

    def check(self, fix: bool = False) -> list[Problem]:
        """Every damaged record; with `fix` it is set aside, so that it is not read again."""

    def shrink(self) -> None:
        """Make sure that nothing removed can be read back from files. Raises StoreError when that fails."""

    def close(self) -> None:
        """Release files. Calling it again does nothing."""


def checksum(namespace: str, kind: str, key: str, text: str) -> str:
    """XXH3-128 of a record, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest("\0".join((namespace, kind, key, text)).encode("utf-8", "surrogatepass")))


def list_key(*parts: Any) -> str:
    """A key made of several parts, such that a list of fewer parts gives a prefix; see `list_prefix`."""
    return json.dumps(list(parts), ensure_ascii=False)


def list_prefix(*parts: Any) -> str:
    """What exactly those keys of `list_key` begin with that have these parts first, and more behind them."""
    return json.dumps(list(parts), ensure_ascii=False)[:-1] + ", "


def parse_row(namespace: str, kind: str, key: str, text: Any, found: Any) -> Mapping[str, Any] | None:
    """The value of a row if it is what was written, else None, and a warning."""
    if isinstance(text, str) and checksum(namespace, kind, key, text) == found:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    logger.warning(
        "kvmem: the %s %r in namespace %r is damaged, and is left out. Run `kvmem doctor --fix` to set it aside.",
        kind.partition(":")[0],
        key[:100],
        namespace,
    )
    return None


def in_order(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.position)


def next_revision(last: int) -> int:
    """A revision for a database without a counter: nanoseconds since 1970, and always more than `last`."""
    return max(last + 1, time.time_ns())
