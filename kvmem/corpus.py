"""Corpus: the documents of one namespace, kept in the store in the order they were added."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from kvmem.any_model import AnyModel
from kvmem.document import Chunk, Document
from kvmem.errors import UnknownDocumentError
from kvmem.prompt import Span, Typesetter
from kvmem.settings import SplitSettings
from kvmem.split import KnownTexts, headings, split
from kvmem.store.base import Store

_KEPT_SPANS = 8192


@dataclass(frozen=True)
class _Row:
    """A stored document: its text in the store, and what that says."""

    raw: str
    order: int
    document: Document
    chunks: tuple[Chunk, ...]


class Corpus:
    """Documents by id. Reading back after a restart gives the same documents in the same order."""

    def __init__(
        self, store: Store, model: AnyModel, typesetter: Typesetter, namespace: str, settings: SplitSettings
    ) -> None:
        self._rows = store.documents
        self._model, self._namespace, self._settings = model, namespace, settings
        self._typesetter = typesetter
        self._spans: OrderedDict[tuple[str, str, str], Span] = OrderedDict()
        self._parsed: dict[str, _Row] = {}
        self._cut = KnownTexts(lambda text: split(text, model.count_all, settings))
        self._lock = threading.Lock()

    def _name(self, document_id: str) -> str:
        return json.dumps([self._namespace, document_id])

    def split(self, document: Document) -> Document:
        """`document` with chunks, unless it has some."""
        return replace(document, chunks=document.chunks or self._cut(document.text))

    def chunks_of(self, document: Document) -> tuple[Chunk, ...]:
        """The chunks of a document that was split, with their headings if the settings ask for them."""
        title = document.metadata.get("title")
        above = (
            headings(document.chunks, title if isinstance(title, str) else None)
            if self._settings.headings
            else [""] * len(document.chunks)
        )
        pairs = enumerate(zip(document.chunks, above, strict=True))
        return tuple(Chunk(text, document.id, index, document.metadata, line) for index, (text, line) in pairs)

    def put(self, document: Document) -> Document:
        """Keep `document`, split into chunks unless it has some; one of the same id keeps its place."""
        document = self.split(document)
        with self._lock:
            old = self._rows.get(self._name(document.id))
            order = json.loads(old)["order"] if old is not None else self._next_order()
            self._rows[self._name(document.id)] = json.dumps(
                {
                    "id": document.id,
                    "metadata": dict(document.metadata),
                    "chunks": list(document.chunks),
                    "order": order,
                }
            )
        return document

    def _next_order(self) -> int:
        return 1 + max((row.order for row in self._ordered()), default=-1)

    def get(self, document_id: str) -> Document:
        """Raises UnknownDocumentError."""
        row = self._rows.get(self._name(document_id))
        if row is None:
            known = ", ".join(repr(d.id) for d in self) or "none"
            raise UnknownDocumentError(
                f"There is no document {document_id!r} in namespace {self._namespace!r}. Known ids: {known[:500]}."
            )
        return _document(row)

    def find(self, document_id: str) -> Document | None:
        row = self._rows.get(self._name(document_id))
        return None if row is None else _document(row)

    def remove(self, document_id: str) -> Document:
        """Raises UnknownDocumentError."""
        document = self.get(document_id)
        with self._lock:
            del self._rows[self._name(document_id)]
        return document

    def _ordered(self) -> list[_Row]:
        """The rows of this namespace; those that are as they were are not parsed again."""
        mine = self._name("")[: -len('""]')]
        parsed = {}
        for name, raw in self._rows.items():
            if name.startswith(mine):
                known = self._parsed.get(name)
                parsed[name] = known if known is not None and known.raw == raw else self._parse(raw)
        self._parsed = parsed
        return sorted(parsed.values(), key=lambda row: row.order)

    def _parse(self, raw: str) -> _Row:
        document = _document(raw)
        return _Row(raw, int(json.loads(raw)["order"]), document, self.chunks_of(document))

    def __iter__(self) -> Iterator[Document]:
        # A copy: what is done to its metadata stays with whoever does it.
        return (replace(row.document, metadata=deepcopy(row.document.metadata)) for row in self._ordered())

    def chunks(self) -> list[Chunk]:
        """Every chunk of every document, in order."""
        return [chunk for row in self._ordered() for chunk in row.chunks]

    def span(self, chunk: Chunk) -> Span:
        """The chunk as tokens."""
        return self.spans([chunk])[0]

    def spans(self, chunks: Sequence[Chunk]) -> list[Span]:
        """The chunks as tokens; those used last are kept, since tokenising is slower than looking up."""
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

    def release(self) -> None:
        """Forget what is kept in memory."""
        with self._lock:
            self._spans.clear()
        self._cut.clear()
        self._typesetter.release()
        self._parsed = {}

    def in_use(self) -> set[str]:
        """Digests of the spans of every chunk there is."""
        return {span.digest for span in self.spans(self.chunks())}


def _document(row: str) -> Document:
    fields = json.loads(row)
    chunks = tuple(fields["chunks"])
    return Document(fields["id"], "".join(chunks), fields["metadata"], chunks)
