"""Library: reads documents into the store as they come, and forgets what no document has any more."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from kvmem.backend import Backend
from kvmem.corpus import Corpus
from kvmem.document import Document
from kvmem.entry import EntryKey
from kvmem.errors import InputError, PromptTooLongError, UnknownDocumentError
from kvmem.prompt import Span
from kvmem.request import RequestBuilder
from kvmem.settings import Settings
from kvmem.stats import DocumentStats, Stats
from kvmem.store.base import Store
from kvmem.store.forget import forget_namespace

# Chunks that are tokenised at a time.
_TOGETHER = 64


class Library:
    """The corpus and the caches of its texts, kept in step. Changes of them wait for each other."""

    def __init__(
        self,
        window: int,
        store: Store,
        corpus: Corpus,
        backend: Backend,
        requests: RequestBuilder,
        settings: Settings,
    ) -> None:
        self._window, self._store, self._corpus, self._settings = window, store, corpus, settings
        self._backend, self._requests = backend, requests
        self._changing = threading.RLock()

    def check(self, document: Document) -> Document:
        """Raise InputError if it is too long."""
        longest = self._settings.max_document_chars
        if len(document.text) > longest:
            raise InputError(
                f"Document {document.id!r} has {len(document.text)} characters, more than {longest}. "
                "Split it into several documents, or raise max_document_chars."
            )
        return document

    def add(self, new: Document) -> Document:
        """Keep and read `new`; on failure the corpus is as it was. One that is there unchanged costs nothing."""
        with self._changing:
            return self._add(new)

    def _add(self, new: Document) -> Document:
        new = self._corpus.split(new)
        old = self._corpus.find(new.id)
        if old == new and all(self._backend.has_read(span) for span in self._spans(new)):
            return new
        self._corpus.put(new)
        try:
            self._read(new, anew=old is None)
        except BaseException:
            if old is None:
                self._corpus.remove(new.id)
            else:
                self._corpus.put(old)
            raise
        if old is not None:
            self._forget(old)
        return new

    def update(self, new: Document) -> Document:
        """Like `add`, of a document that is there. Raises UnknownDocumentError."""
        with self._changing:
            if self._corpus.find(new.id) is None:
                raise UnknownDocumentError(f"There is no document {new.id!r} to update. add() it.")
            return self._add(new)

    def read(self, documents: Sequence[Document]) -> None:
        """Read texts that are not of the corpus, each behind the system prompt; one that is known costs nothing."""
        prefix = self._requests.prefix(None)
        for document in documents:
            spans = self._spans(self._corpus.split(self.check(document)))
            if not all(self._backend.has_read(span) for span in spans):
                self._read_alone(prefix, spans)

    def forget_text(self, document: Document) -> None:
        """Remove the caches of a text that is not of the corpus, unless the corpus has it as well."""
        with self._changing:
            self._forget(self._corpus.split(document))

    def forget_spans(self, spans: Mapping[str, Iterable[str]]) -> None:
        """Remove the caches of a conversation: every entry of these tokens, by fingerprint of the model, but not those
        of the system prompt and of documents."""
        with self._changing:
            self._backend.release()
            kept = self._corpus.in_use() | {span.digest for span in self._requests.prefix(None)}
            for fingerprint, digests in spans.items():
                for digest in set(digests) - kept:
                    key = EntryKey(self._settings.namespace, fingerprint, "", digest)
                    for info in self._store.find(key):
                        self._store.delete(info.key)

    def remove(self, document_id: str) -> None:
        """Raises UnknownDocumentError."""
        with self._changing:
            self._forget(self._corpus.remove(document_id))

    def clear(self) -> None:
        with self._changing:
            for document in tuple(self._corpus):
                self._corpus.remove(document.id)
            self._backend.release()
            self._store.clear(self._settings.namespace)

    def forget_namespace(self, namespace: str) -> int:
        """Remove every byte of a namespace; the number of entries. Raises StoreError."""
        with self._changing:
            self._backend.release()
            self._corpus.release()
            return forget_namespace(self._store, namespace)

    def stats(self) -> Stats:
        rows = tuple(self._document_stats(document) for document in self._corpus)
        chunks, tokens = sum(row.chunks for row in rows), sum(row.tokens for row in rows)
        return Stats(len(rows), chunks, tokens, self._store.stats(self._settings.namespace), rows)

    def _document_stats(self, document: Document) -> DocumentStats:
        spans = self._spans(document)
        infos = [info for span in {span.digest: span for span in spans}.values() for info in self._backend.known(span)]
        size = sum(info.nbytes for info in infos)
        return DocumentStats(document.id, len(spans), sum(map(len, spans)), len(infos), size)

    def _spans(self, document: Document) -> Sequence[Span]:
        return self._corpus.spans(self._corpus.chunks_of(document))

    def _read(self, document: Document, anew: bool) -> None:
        """Bring the document's chunks into the store: in place behind the corpus while that fits the window."""
        prefix = self._requests.prefix(None)
        room = self._window - sum(map(len, prefix)) - self._settings.max_tokens
        chunks, corpus = self._corpus.chunks(), list[Span]()
        for start in range(0, len(chunks), _TOGETHER):
            corpus += self._corpus.spans(chunks[start : start + _TOGETHER])
            if sum(map(len, corpus)) > room:
                self._read_alone(prefix, self._spans(document))
                return
        self._backend.read([*prefix, *corpus], in_place=document.id if anew else None)

    def _read_alone(self, prefix: Sequence[Span], spans: Sequence[Span]) -> None:
        """Read consecutive chunks behind the prefix, as many at a time as fit the window. Raises PromptTooLongError."""
        before = sum(map(len, prefix))
        run: list[Span] = []
        for span in spans:
            if before + len(span) > self._window:
                raise PromptTooLongError(
                    f"A chunk of {len(span)} tokens does not fit the model's window of {self._window}. "
                    "Give smaller chunks, or let kvmem split the text."
                )
            if run and before + sum(map(len, run)) + len(span) > self._window:
                self._backend.read([*prefix, *run])
                run = []
            run.append(span)
        self._backend.read([*prefix, *run])

    def _forget(self, document: Document) -> None:
        used = self._corpus.in_use()
        for span in self._spans(document):
            if span.digest not in used:
                self._backend.forget(span)
