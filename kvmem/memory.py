"""Memory: short texts about a user or a task, kept across restarts, each with its own cache."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from kvmem.engine import KVMem
from kvmem.errors import InputError, UnknownMemoryError
from kvmem.store.records import Record
from kvmem.store.view import RecordView
from kvmem.text.document import Chunk, Document, Metadata, as_document
from kvmem.text.filters import check_filter, matches
from kvmem.text.retrieval import BM25Retriever

_HOUR = 3600.0
_KIND = "memory:"


@dataclass(frozen=True)
class MemoryItem:
    """One memory. importance: in [0, 1]. pinned: always recalled, and first: a user's profile, for example. created,
    updated: seconds since 1970."""

    id: str
    text: str
    metadata: Metadata = field(default_factory=dict)
    importance: float = 0.5
    pinned: bool = False
    created: float = 0.0
    updated: float = 0.0


@dataclass(frozen=True)
class Recalled:
    """A memory that was found. score: see `Memory.recall`."""

    item: MemoryItem
    score: float


class Memory:
    """The memories of one space within an engine's namespace.

    space: keeps memories of several kinds or agents apart; users are kept apart by the engine's namespace, see
        `KVMem.forget_user`. decay: by how much a memory fades in an hour.
    May be used from any thread.
    """

    def __init__(
        self, mem: KVMem, space: str = "default", *, decay: float = 0.995, clock: Callable[[], float] = time.time
    ) -> None:
        if not isinstance(space, str) or not space:
            raise InputError(f"space={space!r} cannot be used. Give a text that is not empty.")
        if not 0 < decay <= 1:
            raise InputError(f"decay={decay!r} is outside (0, 1].")
        self.mem, self.space = mem, space
        self._decay, self._clock = decay, clock
        self._database = mem.store.database
        self._records = self._database.records(mem.settings.namespace, f"{_KIND}{space}")
        self._texts = _Texts(mem)
        self._words = BM25Retriever()

    def remember(
        self,
        text: str,
        *,
        id: str | None = None,  # noqa: A002
        metadata: Metadata | None = None,
        importance: float = 0.5,
        pinned: bool = False,
    ) -> MemoryItem:
        """Keep a text, and read it once. One of the same id is replaced. Raises InputError, EmptyInputError."""
        document = as_document(text, id or uuid4().hex, metadata)
        now = self._clock()

        def change(old: MemoryItem | None) -> MemoryItem:
            created = now if old is None else old.created
            return MemoryItem(document.id, document.text, document.metadata, importance, pinned, created, now)

        return self._write(document.id, change)

    def update(
        self,
        id: str,  # noqa: A002
        *,
        text: str | None = None,
        metadata: Metadata | None = None,
        importance: float | None = None,
        pinned: bool | None = None,
    ) -> MemoryItem:
        """Change what is given of a memory. Raises UnknownMemoryError, InputError, EmptyInputError."""
        given: dict[str, Any] = {"importance": importance, "pinned": pinned}
        given = {name: value for name, value in given.items() if value is not None}

        def change(old: MemoryItem | None) -> MemoryItem:
            if old is None:
                raise self._unknown(id)
            content = as_document(
                old.text if text is None else text, id, old.metadata if metadata is None else metadata
            )
            return replace(old, text=content.text, metadata=content.metadata, updated=self._clock(), **given)

        return self._write(id, change)

    def _write(self, id: str, change: Callable[[MemoryItem | None], MemoryItem]) -> MemoryItem:  # noqa: A002
        """Write a memory as `change` makes it from the one that is there, in one transaction; nothing is lost when
        several processes change one memory."""
        self.mem.read([_document(_checked(change(self.find(id))))])
        with self._database.transaction():
            old = self.find(id)
            item = _checked(change(old))
            self._records.put(id, {**vars(item), "metadata": dict(item.metadata)})
            gone = [old] if old is not None and _document(old) != _document(item) else []
            tombstone = self.mem.bury_texts(map(_document, gone))
        self._release(gone, tombstone)
        return item

    def _release(self, gone: Sequence[MemoryItem], tombstone: str | None) -> None:
        """Remove the caches of texts that are no longer in a memory of any space."""
        kept = [item for item in gone if self._texts.has(item)]
        removed = [item for item in gone if item not in kept]
        self.mem.forget_texts(map(_document, removed), map(_document, kept), tombstone)

    def get(self, id: str) -> MemoryItem:  # noqa: A002
        """Raises UnknownMemoryError."""
        item = self.find(id)
        if item is None:
            raise self._unknown(id)
        return item

    def _unknown(self, id: str) -> UnknownMemoryError:  # noqa: A002
        return UnknownMemoryError(f"There is no memory {id!r} in space {self.space!r}. list() names them.")

    def find(self, id: str) -> MemoryItem | None:  # noqa: A002
        """The memory, or None."""
        record = self._records.get(id)
        return None if record is None else _item(record)

    def list(self) -> Sequence[MemoryItem]:
        """All, oldest first."""
        items = [_item(record) for record in self._records.scan()]
        return sorted(items, key=lambda item: (item.created, item.id))

    def forget(self, id: str) -> None:  # noqa: A002
        """Remove a memory, and its caches if no document or other memory needs them. Conversations it was part of keep
        what was in their prompts: see `KVMem.forget_thread`. Raises UnknownMemoryError."""
        with self._database.transaction():
            item = self.get(id)
            self._records.delete(id)
            tombstone = self.mem.bury_texts([_document(item)])
        self._release([item], tombstone)

    def clear(self) -> None:
        """Forget everything in this space."""
        with self._database.transaction():
            items = self.list()
            self._records.clear()
            tombstone = self.mem.bury_texts(map(_document, items))
        self._release(items, tombstone)

    def recall(
        self,
        query: str,
        k: int = 5,
        *,
        where: Mapping[str, Any] | None = None,
        minimum: float = 0.0,
        without: Collection[str] = (),
    ) -> Sequence[Recalled]:
        """The `k` memories that matter most for `query`, best first; pinned ones come before them and do not count.

        The score is the mean of relevance (BM25, the best memory's being 1), importance, and recency (decay to the
        power of the hours since it was last changed), as in Generative Agents (Park et al., UIST 2023).
        where: a filter over metadata, as `documents=` of `KVMem.ask`. minimum: of the relevance, in [0, 1].
        without: ids to leave out.
        Raises InputError.
        """
        if k < 0:
            raise InputError(f"k={k} is below 0.")
        wanted = dict(where or {})
        check_filter(wanted)
        items = [item for item in self.list() if item.id not in without and matches(item.metadata, wanted)]
        chunks = [Chunk(item.text, item.id, 0, item.metadata) for item in items]
        relevance = self._words.score(query, chunks) if query.strip() else [0.0] * len(items)
        best = max(relevance, default=0.0) or 1.0
        now = self._clock()
        found = []
        for item, relevant in zip(items, relevance, strict=True):
            recency = math.pow(self._decay, max(0.0, now - item.updated) / _HOUR)
            if item.pinned or relevant / best >= minimum:
                found.append(Recalled(item, (relevant / best + item.importance + recency) / 3))
        pinned = [r for r in found if r.item.pinned]
        rest = sorted((r for r in found if not r.item.pinned), key=lambda r: (-r.score, r.item.created))
        return [*pinned, *rest[:k]]

    def context(self, query: str, k: int = 5, **options: Any) -> Sequence[Document]:
        """What `recall` finds, as context for `KVMem.chat`: pinned memories first, then the others, oldest first, so
        that what is recalled again stands where it stood."""
        found = self.recall(query, k, **options)
        ordered = sorted(found, key=lambda r: (not r.item.pinned, r.item.created, r.item.id))
        return [_document(r.item) for r in ordered]


class _Texts:
    """The texts of the memories of every space in an engine's namespace, counted."""

    def __init__(self, mem: KVMem) -> None:
        self._database, self._namespace = mem.store.database, mem.settings.namespace
        self._counted: Counter[tuple[str, Any]] = Counter()
        self._views: dict[str, RecordView[tuple[str, Any]]] = {}
        self._lock = threading.Lock()

    def has(self, item: MemoryItem) -> bool:
        """Whether any memory has the text of `item`, under the same title."""
        with self._lock:
            for kind in {*self._views, *self._database.kinds(self._namespace, _KIND)}:
                if kind not in self._views:
                    self._views[kind] = RecordView(self._database, self._namespace, kind, _text_of, self._count)
                self._views[kind].refresh()
            return (item.text, item.metadata.get("title")) in self._counted

    def _count(self, old: tuple[str, Any] | None, new: tuple[str, Any] | None) -> None:
        if old is not None:
            self._counted[old] -= 1
            if not self._counted[old]:
                del self._counted[old]
        if new is not None:
            self._counted[new] += 1


def _document(item: MemoryItem) -> Document:
    """A memory is one chunk."""
    return Document(f"memory/{item.id}", item.text, item.metadata, (item.text,))


def _text_of(record: Record) -> tuple[str, Any]:
    return record.value["text"], record.value["metadata"].get("title")


def _item(record: Record) -> MemoryItem:
    return MemoryItem(**record.value)


def _checked(item: MemoryItem) -> MemoryItem:
    """Raises InputError."""
    if isinstance(item.importance, bool) or not isinstance(item.importance, (int, float)):
        raise InputError(f"importance must be a number in [0, 1], not {item.importance!r}.")
    if not 0 <= item.importance <= 1:
        raise InputError(f"importance must be in [0, 1], not {item.importance}.")
    return item
