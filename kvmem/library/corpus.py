"""Corpus: the documents of a collection, as records in the order they were added, and their chunks as tokens."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from kvmem.cancellation import NEVER, Cancellation
from kvmem.errors import InputError, UnknownDocumentError
from kvmem.library.selection import Selection
from kvmem.model.base import AnyModel
from kvmem.prompt.layout import Typesetter, standing
from kvmem.prompt.span import Span
from kvmem.settings import SplitSettings
from kvmem.store.memory_records import MemoryDatabase
from kvmem.store.records import Database, Record
from kvmem.store.view import RecordView
from kvmem.text.chunking import KnownTexts, headings, split
from kvmem.text.document import Chunk, Document
from kvmem.text.filters import Filter, check_filter, matches

_KEPT_SPANS = 8192
# Documents that an error names.
_NAMED = 20
KIND = "document"
DocumentFilter = Sequence[str] | Filter


class Chunker:
    """Cuts documents into chunks, and tokenizes them, for one model. May be used from any thread."""

    def __init__(self, model: AnyModel, typesetter: Typesetter, settings: SplitSettings) -> None:
        self._typesetter, self._settings = typesetter, settings
        self._spans: OrderedDict[tuple[str, str, str], Span] = OrderedDict()
        self._cut = KnownTexts(lambda text, count: split(text, count, settings), model.count_all)
        self._lock = threading.Lock()
        # Token counts stored under another scheme are counted again.
        self.scheme = f"{model.tokenizer_digest}-{settings.headings}"

    def split(self, document: Document, cancellation: Cancellation = NEVER) -> Document:
        """`document` with chunks, unless it has some."""
        return replace(document, chunks=document.chunks or self._cut(document.text, cancellation))

    def chunks_of(self, document: Document) -> tuple[Chunk, ...]:
        """The chunks of a document that was split, with their headings if the settings ask for them."""
        title = document.metadata.get("title")
        if document.heading is not None or not self._settings.headings:
            above = [document.heading or ""] * len(document.chunks)
        else:
            above = headings(document.chunks, title if isinstance(title, str) else None)
        pairs = enumerate(zip(document.chunks, above, strict=True))
        return tuple(Chunk(text, document.id, index, document.metadata, line) for index, (text, line) in pairs)

    def spans(self, chunks: Sequence[Chunk]) -> list[Span]:
        """The chunks as tokens; those used last are kept, since tokenizing is slower than looking up."""
        keys = [(chunk.document_id, chunk.heading, chunk.text) for chunk in chunks]
        with self._lock:
            found = {key: self._spans[key] for key in keys if key in self._spans}
        new = [key for key in dict.fromkeys(keys) if key not in found]
        texts = [(heading + text, document) for document, heading, text in new]
        found |= zip(new, self._typesetter.chunks(texts), strict=True)
        with self._lock:
            for key in keys:
                self._spans[key] = found[key]
                self._spans.move_to_end(key)
            while len(self._spans) > _KEPT_SPANS:
                self._spans.popitem(last=False)
        return [found[key] for key in keys]

    def sizes(self, chunks: Sequence[Chunk]) -> list[int]:
        """Tokens of each chunk as it stands in a prompt."""
        return [len(span) for span in self.spans(chunks)]

    def release(self) -> None:
        """Forget what is kept in memory."""
        with self._lock:
            self._spans.clear()
        self._cut.clear()
        self._typesetter.release()


@dataclass(frozen=True, eq=False)
class _Row:
    """A stored document. sizes: tokens of its chunks; None if they were counted under another scheme."""

    document: Document
    chunks: tuple[Chunk, ...]
    sizes: tuple[int, ...] | None


class Corpus:
    """Documents by id. Reading back after a restart gives the same documents in the same order."""

    def __init__(self, database: Database, namespace: str, kind: str, chunker: Chunker) -> None:
        self.namespace, self.kind, self._chunker = namespace, kind, chunker
        # How many chunks stand in prompts as a text.
        self._uses: Counter[str] = Counter()
        # Tokens of all documents but those whose tokens were counted under another scheme.
        self._known_tokens = 0
        self._records = database.records(namespace, kind)
        self._view = RecordView(database, namespace, kind, self._parse, self._count)
        self._selected: tuple[list[_Row], Selection] | None = None

    def _parse(self, record: Record) -> _Row:
        value = record.value
        chunks = tuple(value["chunks"])
        document = Document(value["id"], "".join(chunks), value["metadata"], chunks, value.get("heading"))
        known = value.get("scheme") == self._chunker.scheme
        return _Row(document, self._chunker.chunks_of(document), tuple(value["sizes"]) if known else None)

    def _count(self, old: _Row | None, new: _Row | None) -> None:
        for row, sign in ((old, -1), (new, 1)):
            if row is None:
                continue
            for chunk in row.chunks:
                self._uses[standing(chunk.heading + chunk.text)] += sign
            self._known_tokens += sign * sum(row.sizes or ())

    def put(self, document: Document) -> Document:
        """Keep `document`, split into chunks unless it has some; one of the same id keeps its place."""
        document = self._chunker.split(document)
        self._records.put(document.id, self._value(document))
        return document

    def _value(self, document: Document) -> dict[str, Any]:
        return {
            "id": document.id,
            "metadata": dict(document.metadata),
            "chunks": list(document.chunks),
            "heading": document.heading,
            "scheme": self._chunker.scheme,
            "sizes": self._chunker.sizes(self._chunker.chunks_of(document)),
        }

    def undo(self, new: Document, old: Document | None) -> None:
        """Put back what was there before `new`, unless another process has changed or removed it since."""
        record = self._records.get(new.id)
        if record is None or record.value != json.loads(json.dumps(self._value(new))):
            return
        if old is None:
            self._records.delete(new.id)
        else:
            self._records.put(old.id, self._value(old))

    def get(self, document_id: str) -> Document:
        """Raises UnknownDocumentError."""
        found = self.find(document_id)
        if found is None:
            raise self.unknown(document_id)
        return found

    def unknown(self, document_id: str) -> UnknownDocumentError:
        ids = [row.document.id for row in self._view.all()]
        known = ", ".join(map(repr, ids[:_NAMED])) + (f" and {len(ids) - _NAMED} more" if ids[_NAMED:] else "")
        where = f"collection {name!r}" if (name := name_of(self.kind)) else f"namespace {self.namespace!r}"
        return UnknownDocumentError(f"There is no document {document_id!r} in {where}. Known ids: {known or 'none'}.")

    def find(self, document_id: str) -> Document | None:
        row = self._view.get(document_id)
        return None if row is None else _copy(row.document)

    def delete(self, document_ids: Sequence[str]) -> None:
        """Delete documents, all or none. Raises UnknownDocumentError."""
        try:
            self._view.delete(document_ids)
        except KeyError as error:
            raise self.unknown(error.args[0]) from None

    def clear(self) -> None:
        self._records.clear()

    def __iter__(self) -> Iterator[Document]:
        # What callers do to a document's metadata must not change the stored one.
        return (_copy(row.document) for row in self._view.all())

    def __len__(self) -> int:
        return len(self._view.all())

    def chunks(self) -> list[Chunk]:
        """Every chunk of every document, in order."""
        return self.select(None).chunks

    def select(self, wanted: DocumentFilter | None) -> Selection:
        """The chunks of all documents, of those with these ids, or of those whose metadata passes a filter.

        Raises UnknownDocumentError, InputError.
        """
        rows = self._view.all()
        if wanted is not None:
            chosen = self._chosen(rows, wanted)
            return self._selection(chosen, len(chosen) == len(rows))
        kept = self._selected
        if kept is None or kept[0] is not rows:
            kept = self._selected = rows, self._selection(rows, True)
        return kept[1]

    def fits(self, room: int) -> bool:
        """Whether all chunks together have at most `room` tokens."""
        self._view.refresh()
        return self._known_tokens <= room and sum(self.select(None).sizes) <= room

    def _selection(self, rows: Sequence[_Row], complete: bool) -> Selection:
        chunks = [chunk for row in rows for chunk in row.chunks]
        if any(row.sizes is None for row in rows):
            return Selection(chunks, self._chunker.sizes(chunks), complete)
        return Selection(chunks, [size for row in rows for size in row.sizes or ()], complete)

    def _chosen(self, rows: Sequence[_Row], wanted: DocumentFilter) -> list[_Row]:
        if isinstance(wanted, Mapping):
            check_filter(wanted)
            return [row for row in rows if matches(row.document.metadata, wanted)]
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise InputError(f"documents is a {type(wanted).__name__}. Give a list of ids, or a filter over metadata.")
        ids = list(wanted)
        known = {row.document.id for row in rows}
        for missing in (one for one in ids if one not in known):
            raise self.unknown(missing)
        chosen = set(ids)
        return [row for row in rows if row.document.id in chosen]

    def release(self) -> None:
        """Forget what is kept in memory."""
        self._view.release()
        self._selected = None

    def is_used(self, text: str) -> bool:
        """Whether any document has a chunk that stands in prompts as `text`."""
        self._view.refresh()
        return self._uses.get(text, 0) > 0


class Corpora:
    """The corpora of one namespace: the engine's own, those of named collections, and those kept in memory only."""

    def __init__(self, database: Database, namespace: str, chunker: Chunker) -> None:
        self._database, self._namespace, self._chunker = database, namespace, chunker
        self._named: dict[str, Corpus] = {}
        self._unnamed: WeakSet[Corpus] = WeakSet()
        self._lock = threading.RLock()

    def open(self, name: str | None) -> Corpus:
        """The corpus of a collection: "" is the engine's own, None a new one that is kept in memory only."""
        with self._lock:
            if name is None:
                corpus = Corpus(MemoryDatabase(), self._namespace, KIND, self._chunker)
                self._unnamed.add(corpus)
                return corpus
            kind = kind_of(name)
            if kind not in self._named:
                self._named[kind] = Corpus(self._database, self._namespace, kind, self._chunker)
            return self._named[kind]

    def names(self) -> list[str]:
        """The names of the collections that have documents."""
        kinds = self._database.kinds(self._namespace, f"{KIND}:")
        return [name_of(kind) for kind in kinds]

    def all(self) -> list[Corpus]:
        """Every corpus, those of the store that were not opened yet included."""
        with self._lock:
            for name in ["", *self.names()]:
                self.open(name)
            return [*self._named.values(), *self._unnamed]

    def is_used(self, text: str) -> bool:
        """Whether any document has a chunk that stands in prompts as `text`."""
        return any(corpus.is_used(text) for corpus in self.all())

    def release(self) -> None:
        """Forget what is kept in memory."""
        for corpus in self.all():
            corpus.release()
        self._chunker.release()


def kind_of(name: str) -> str:
    """The kind of the records of a collection."""
    return f"{KIND}:{name}" if name else KIND


def name_of(kind: str) -> str:
    return kind.partition(":")[2]


def _copy(document: Document) -> Document:
    return replace(document, metadata=deepcopy(document.metadata))
