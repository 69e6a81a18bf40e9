"""Corpus: the documents of one namespace, kept in the store in the order they were added."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace

from kvmem.document import Chunk, Document, split
from kvmem.entry import digest_tokens
from kvmem.errors import UnknownDocumentError
from kvmem.model import LanguageModel
from kvmem.prompt import Span, Typesetter
from kvmem.settings import SplitSettings
from kvmem.store.base import Store


class Corpus:
    """Documents by id. Reading back after a restart gives the same documents in the same order."""

    def __init__(
        self, store: Store, model: LanguageModel, typesetter: Typesetter, namespace: str, settings: SplitSettings
    ) -> None:
        self._rows = store.documents
        self._model, self._namespace, self._settings = model, namespace, settings
        self._typesetter = typesetter
        self._spans: dict[str, Span] = {}
        self._lock = threading.Lock()

    def _name(self, document_id: str) -> str:
        return json.dumps([self._namespace, document_id])

    def put(self, document: Document) -> Document:
        """Keep `document`, split into chunks unless it has some; one of the same id keeps its place."""
        chunks = document.chunks or split(document.text, self._model.count_tokens, self._settings)
        document = replace(document, chunks=chunks)
        with self._lock:
            old = self._rows.get(self._name(document.id))
            order = json.loads(old)["order"] if old is not None else self._next_order()
            self._rows[self._name(document.id)] = json.dumps(
                {
                    "id": document.id,
                    "metadata": dict(document.metadata),
                    "chunks": list(chunks),
                    "order": order,
                }
            )
        return document

    def _next_order(self) -> int:
        return 1 + max((order for order, _ in self._ordered()), default=-1)

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

    def _ordered(self) -> list[tuple[int, Document]]:
        rows = (self._rows.get(name) for name in self._rows if json.loads(name)[0] == self._namespace)
        documents = [(int(json.loads(row)["order"]), _document(row)) for row in rows if row is not None]
        return sorted(documents, key=lambda pair: pair[0])

    def __iter__(self) -> Iterator[Document]:
        return (document for _, document in self._ordered())

    def chunks(self) -> list[Chunk]:
        """Every chunk of every document, in order."""
        return [chunk for document in self for chunk in chunks_of(document)]

    def span(self, chunk: Chunk) -> Span:
        """The chunk as tokens; kept, since tokenising is slower than looking up."""
        key = digest_tokens(chunk.text.encode()) + chunk.document_id
        with self._lock:
            if key not in self._spans:
                self._spans[key] = self._typesetter.chunk(chunk.text, chunk.document_id)
            return self._spans[key]

    def in_use(self) -> set[str]:
        """Digests of the spans of every chunk there is."""
        return {self.span(chunk).digest for chunk in self.chunks()}


def chunks_of(document: Document) -> list[Chunk]:
    return [Chunk(text, document.id, index, document.metadata) for index, text in enumerate(document.chunks)]


def _document(row: str) -> Document:
    fields = json.loads(row)
    chunks = tuple(fields["chunks"])
    return Document(fields["id"], "".join(chunks), fields["metadata"], chunks)
