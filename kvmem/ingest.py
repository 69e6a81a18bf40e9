"""Ingestion: computes and stores the caches of documents, and removes those that no document uses any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from kvmem.backends.base import Backend
from kvmem.cancellation import NEVER, Cancellation
from kvmem.errors import InputError, PromptTooLongError, StoreError, UnknownDocumentError
from kvmem.kv.entry import EntryKey
from kvmem.library.corpus import Chunker, Corpora, Corpus
from kvmem.library.request import RequestBuilder
from kvmem.library.stats import DocumentStats, Stats
from kvmem.library.tombstones import THREAD_SPAN, Tombstones, digest_of
from kvmem.model.base import AnyModel
from kvmem.prompt.layout import Message, standing
from kvmem.prompt.span import Span
from kvmem.settings import Settings
from kvmem.store.base import Store
from kvmem.text.document import Document

logger = logging.getLogger("kvmem")
# Documents are read together up to so many characters: one forward pass each costs more than one for several, and
# what was read before an interruption is kept.
_TOGETHER = 8_000
Progress = Callable[[Document, int, int], None]


class Ingestion:
    """The corpora and the caches of their texts, kept in step. Changes of them wait for each other."""

    def __init__(
        self,
        model: AnyModel,
        store: Store,
        corpora: Corpora,
        chunker: Chunker,
        backend: Backend,
        requests: RequestBuilder,
        tombstones: Tombstones,
        settings: Settings,
    ) -> None:
        self._model, self._window = model, model.window
        self._store, self._settings, self._tombstones = store, settings, tombstones
        self._corpora, self._chunker = corpora, chunker
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

    def groups(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Consecutive documents that are read together."""
        group: list[Document] = []
        for document in documents:
            if group and sum(len(held.text) for held in group) + len(document.text) > _TOGETHER:
                yield group
                group = []
            group.append(document)
        if group:
            yield group

    def add(
        self,
        corpus: Corpus,
        documents: Sequence[Document],
        cancellation: Cancellation = NEVER,
        read: bool = True,
        prompt: Sequence[Message] | None = None,
    ) -> list[Document]:
        """Keep documents and read them; on failure the corpus is as it was. Unchanged documents cost nothing.

        read: if False, the first prompt that needs them reads them.
        prompt: the messages that they will stand in; None for those of a question.
        """
        with self._changing:
            given = [self._chunker.split(document, cancellation) for document in documents]
            olds = {new.id: corpus.find(new.id) for new in given}
            changed = [new for new in given if olds[new.id] != new or (read and not self._has_read(new))]
            if not changed:
                return given
            replaced = [old for new in changed if (old := olds[new.id]) is not None and old != new]
            gone = self._digests(replaced)
            with self._store.database.transaction():
                tombstone = self._tombstones.put(gone)
                for new in changed:
                    corpus.put(new)
            self._tombstones.revive(self._digests(changed))
            try:
                if read:
                    new_ids = {new.id for new in changed if olds[new.id] is None}
                    self._read(corpus, changed, new_ids, self._requests.before(prompt), cancellation)
            except BaseException:
                with self._store.database.transaction():
                    for new in changed:
                        corpus.undo(new, olds[new.id])
                raise
            self._forget_all(replaced, tombstone)
            return given

    def update(self, corpus: Corpus, new: Document, cancellation: Cancellation = NEVER) -> Document:
        """Like `add`, of a document that is there. Raises UnknownDocumentError."""
        with self._changing:
            if corpus.find(new.id) is None:
                raise UnknownDocumentError(f"There is no document {new.id!r} to update. add() it.")
            return self.add(corpus, [new], cancellation)[0]

    def read(self, documents: Sequence[Document], cancellation: Cancellation = NEVER) -> None:
        """Read texts that are not of the corpus, each behind the system prompt; one that is known costs nothing."""
        prefix = self._requests.prefix(None)
        for document in documents:
            new = self._chunker.split(self.check(document), cancellation)
            self._tombstones.revive(self._digests([new]))
            if not self._has_read(new):
                self._read_alone(prefix, self._spans(new), cancellation)

    def forget_text(self, document: Document) -> None:
        """Remove the caches of a text that is not of the corpus, unless a document has it as well."""
        with self._changing:
            self._forget(self._chunker.split(document))

    def forget_spans(
        self, spans: Mapping[str, Iterable[str]], used: Iterable[str] = (), tombstone: str | None = None
    ) -> None:
        """Remove the caches of a conversation: every entry of these tokens, by fingerprint of the model, but not those
        of the system prompt and of documents, and not what the keys of threads in `used` name."""
        with self._changing:
            there = self._entries(spans)
            self._backend.release()
            if not there:
                return
            kept = {span.digest for span in self._requests.prefix(None)} | {digest_of(key) for key in used}
            for corpus in self._corpora.all():
                kept |= {span.digest for span in self._chunker.spans(corpus.chunks())}
            for key in there:
                if key.tokens not in kept:
                    self._store.delete(key)
            self._tombstones.finish(tombstone, kept)

    def bury(self, documents: Iterable[Document]) -> str | None:
        """Like `bury_spans`, for documents."""
        return self.bury_spans(self._digests(documents))

    def bury_spans(self, spans: Mapping[str, Iterable[str]]) -> str | None:
        """Record which caches have to be deleted, before or in the transaction that removes their text.

        Returns a key for `finish`.
        """
        return self._tombstones.put(spans)

    def forget_texts(self, gone: Iterable[Document], kept: Iterable[Document], tombstone: str | None) -> None:
        """Like `forget_text`, for texts that `bury` was called for. kept: those that are still in use after all."""
        with self._changing:
            used = {digest for digests in self._digests(kept).values() for digest in digests}
            self._forget_all(map(self._chunker.split, gone), tombstone, used)

    def _entries(self, spans: Mapping[str, Iterable[str]]) -> list[EntryKey]:
        """Every entry of these tokens, by fingerprint of the model."""
        keys = [EntryKey(self._settings.namespace, f, "", digest) for f, found in spans.items() for digest in found]
        return [info.key for key in keys for info in self._store.find(key)]

    def _digests(self, documents: Iterable[Document]) -> dict[str, list[str]]:
        return {self._model.fingerprint: [span.digest for document in documents for span in self._spans(document)]}

    def settle(self) -> None:
        """Delete the caches of removed text that a process has left behind, except those that are in use again.

        If the store cannot be read now, the next opening does it.
        """
        records = self._store.database.records(self._settings.namespace, THREAD_SPAN)
        try:
            self._tombstones.settle(lambda spans: self.forget_spans(spans, records.keys()))
        except StoreError as error:
            logger.warning("kvmem: could not check for caches of removed text (%s); the next open tries again", error)

    def split(self, text: str) -> tuple[str, ...]:
        """The chunks that a text is cut into."""
        return self._chunker.split(Document("", text)).chunks

    def remove(self, corpus: Corpus, document_ids: Sequence[str]) -> None:
        """Raises UnknownDocumentError; nothing is removed then."""
        with self._changing:
            removed = [corpus.get(document_id) for document_id in dict.fromkeys(document_ids)]
            tombstone = self.bury(removed)
            corpus.delete([document.id for document in removed])
            self._forget_all(removed, tombstone)

    def keep_only(self, corpus: Corpus, document_ids: Container[str]) -> None:
        """Remove all documents but these."""
        with self._changing:
            removed = [document for document in corpus if document.id not in document_ids]
            tombstone = self.bury(removed)
            for document in removed:
                with suppress(UnknownDocumentError):  # another process was faster
                    corpus.delete([document.id])
            self._forget_all(removed, tombstone)

    def clear(self) -> None:
        """Remove every document, also those of collections, and every cache of the namespace."""
        with self._changing:
            for corpus in self._corpora.all():
                corpus.clear()
            self._backend.release()
            self._store.clear(self._settings.namespace)

    def forget_namespace(self, namespace: str) -> int:
        """Remove every byte of a namespace; the number of entries. Raises StoreError."""
        with self._changing:
            self._backend.release()
            self._corpora.release()
            self._store.database.forget(namespace)
            removed = self._store.clear(namespace)
            self._store.scrub(namespace)
            return removed

    def stats(self, corpus: Corpus) -> Stats:
        rows = tuple(self._document_stats(document) for document in corpus)
        chunks, tokens = sum(row.chunks for row in rows), sum(row.tokens for row in rows)
        return Stats(len(rows), chunks, tokens, self._store.stats(self._settings.namespace), rows)

    def _document_stats(self, document: Document) -> DocumentStats:
        spans = self._spans(document)
        infos = [info for span in {span.digest: span for span in spans}.values() for info in self._backend.known(span)]
        size = sum(info.nbytes for info in infos)
        return DocumentStats(document.id, len(spans), sum(map(len, spans)), len(infos), size)

    def _has_read(self, document: Document) -> bool:
        return all(self._backend.has_read(span) for span in self._spans(document))

    def _spans(self, document: Document) -> Sequence[Span]:
        return self._chunker.spans(self._chunker.chunks_of(document))

    def _read(
        self,
        corpus: Corpus,
        documents: Sequence[Document],
        new: set[str],
        prefix: Sequence[Span],
        cancellation: Cancellation,
    ) -> None:
        """Bring documents into the store: in place behind the corpus while that fits the window.

        new: the ids of those that were not there before. They are read in place even where their text was read in
        another context, so that a prompt of the whole corpus is exact.
        """
        room = self._window - sum(map(len, prefix)) - self._settings.max_tokens
        if corpus.fits(room):
            every = self._chunker.spans(corpus.select(None).chunks)
            self._backend.read([*prefix, *every], cancellation, frozenset(new))
            return
        for document in documents:
            self._read_alone(prefix, self._spans(document), cancellation)

    def _read_alone(self, prefix: Sequence[Span], spans: Sequence[Span], cancellation: Cancellation) -> None:
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
                self._backend.read([*prefix, *run], cancellation)
                run = []
            run.append(span)
        self._backend.read([*prefix, *run], cancellation)

    def _forget_all(
        self, documents: Iterable[Document], tombstone: str | None, used: Collection[str] = frozenset()
    ) -> None:
        """Complete a removal. used: digests that are in use as well."""
        spared = [digest for document in documents for digest in self._forget(document)]
        self._tombstones.finish(tombstone, {*used, *spared})

    def _forget(self, document: Document) -> list[str]:
        """Delete the caches of a document. Returns the digests of chunks that other documents have."""
        used = []
        for chunk in self._chunker.chunks_of(document):
            span = self._chunker.spans([chunk])[0]
            if self._corpora.is_used(standing(chunk.heading + chunk.text)):
                used.append(span.digest)
            else:
                self._backend.forget(span)
        return used
