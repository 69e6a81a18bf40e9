"""OpenedEngine: what an engine holds while it is open, its documents and its conversations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.answering import Answering
from kvmem.backends.open import open_backend, open_model
from kvmem.cancellation import Cancellation
from kvmem.collection import Collection
from kvmem.errors import InputError
from kvmem.ingest import Ingestion, Progress
from kvmem.library.corpus import Chunker, Corpora
from kvmem.library.request import RequestBuilder
from kvmem.library.scope import check_context
from kvmem.library.stats import Stats
from kvmem.library.threads import Threads
from kvmem.library.tombstones import Tombstones
from kvmem.model.base import AnyModel
from kvmem.model.local import LanguageModel
from kvmem.options import EngineOptions
from kvmem.prompt.layout import Typesetter
from kvmem.runtime.worker import Worker
from kvmem.settings import Settings
from kvmem.store.base import Store
from kvmem.store.open import open_store
from kvmem.text.document import Chunk, Document, Metadata, as_document
from kvmem.text.retrieval import BM25Retriever, Retriever

if TYPE_CHECKING:
    from kvmem.engine import KVMem


class OpenedEngine:
    """The part of `KVMem` that opens, keeps documents and conversations, and closes."""

    def __init__(
        self,
        model: str | os.PathLike[str] | AnyModel | PreTrainedModel,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        settings: Settings | None = None,
        retriever: Retriever | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.settings = Settings.parse(settings, options)
        self.model, self._owns_model = open_model(model, tokenizer, self.settings, options)
        self._owns_store = store is None or isinstance(store, (str, os.PathLike))
        self.store = open_store(store, self.settings.storage)
        self.retriever: Retriever = retriever or BM25Retriever()
        namespace, database = self.settings.namespace, self.store.database
        typesetter = Typesetter(self.model)
        chunker = Chunker(self.model, typesetter, self.settings.split)
        self._corpora = Corpora(database, namespace, chunker)
        self._backend = open_backend(self.model, self.store, self.settings, typesetter)
        self._requests = RequestBuilder(self.model, chunker, typesetter, self.retriever, self._backend, self.settings)
        self._ingestion = Ingestion(
            self.model,
            self.store,
            self._corpora,
            chunker,
            self._backend,
            self._requests,
            Tombstones(database, namespace),
            self.settings,
        )
        self._threads = Threads(database, namespace)
        self._worker = Worker(self.model)
        self._answering = Answering(
            self.model,
            self._backend,
            self._requests,
            self._ingestion,
            self._threads,
            self._worker,
            self.settings.max_tokens,
        )
        self._documents = self._collect("")
        self._ingestion.settle()

    @property
    def local_model(self) -> LanguageModel:
        """The model, if it runs in this process. Raises InputError."""
        return self._backend.local_model

    @property
    def limitation(self) -> str | None:
        """Why caches are reused as exact prefixes only; None if they can be blended."""
        return self._backend.limitation

    # Documents

    def add(
        self,
        document: Any,
        id: str | None = None,  # noqa: A002
        metadata: Metadata | None = None,
        *,
        read: bool = True,
        cancellation: Cancellation | None = None,
    ) -> Document:
        """Read a document and keep it; see `Collection.add`."""
        return self._documents.add(document, id, metadata, read=read, cancellation=cancellation)

    def add_all(
        self, documents: Iterable[Any], progress: Progress | None = None, *, read: bool = True
    ) -> Sequence[Document]:
        """Add many documents; see `Collection.add_all`."""
        return self._documents.add_all(documents, progress, read=read)

    def update(self, id: str, document: Any, metadata: Metadata | None = None) -> Document:  # noqa: A002
        """Replace a document that is there; see `Collection.update`."""
        return self._documents.update(id, document, metadata)

    def get(self, id: str) -> Document:  # noqa: A002
        """The document. Raises UnknownDocumentError."""
        return self._documents.get(id)

    def list(self) -> Sequence[Document]:
        """All documents, in the order they were added; those of collections are not among them."""
        return self._documents.list()

    def split(self, text: str) -> tuple[str, ...]:
        """The chunks that a text is cut into when it is added."""
        return self._documents.split(text)

    def chunks(self) -> Sequence[Chunk]:
        """The chunks of all documents, in order."""
        return self._documents.chunks()

    def remove(self, id: str) -> None:  # noqa: A002
        """Remove a document and every cache of text that no other document has. Raises UnknownDocumentError."""
        self._documents.remove(id)

    def collection(self, name: str | None = None) -> Collection:
        """A collection of documents, separate from the engine's own.

        Args:
            name: Keeps them in the store under this name, also after a restart. None keeps the documents in memory for
                as long as the collection is used; their caches are stored all the same.

        Raises:
            InputError: The name is empty.
        """
        if name is not None and (not isinstance(name, str) or not name):
            raise InputError(f"name={name!r} cannot name a collection. Give a text that is not empty, or None.")
        self._worker.check_open()
        return self._collect(name)

    def _collect(self, name: str | None) -> Collection:
        return Collection(cast("KVMem", self), self._corpora.open(name), name, self._ingestion, self._worker)

    def collections(self) -> Sequence[str]:
        """The names of the collections that have documents."""
        self._worker.check_open()
        return self._corpora.names()

    def clear(self) -> None:
        """Remove every document, those of collections too, and every cache of this namespace."""
        self._worker.run(self._ingestion.clear)

    def stats(self) -> Stats:
        """Counts of the documents and of the store."""
        self._worker.check_open()
        return self._ingestion.stats(self._documents.corpus)

    def read(self, context: Iterable[Any]) -> None:
        """Read texts or documents, as in `ScopeOptions.context`, without adding them; later prompts reuse them.

        Raises InputError, EmptyInputError, PromptTooLongError.
        """
        documents = [as_document(item) for item in check_context(context)]
        self._worker.run(lambda: self._ingestion.read(documents, self._worker.closing))

    def bury_texts(self, texts: Iterable[Any]) -> str | None:
        """Record that the caches of texts have to be deleted, in the transaction that removes the texts.

        Call `forget_texts` afterwards, with the key that this returns.
        """
        return self._ingestion.bury(map(as_document, texts))

    def forget_texts(self, gone: Iterable[Document], kept: Iterable[Document], tombstone: str | None) -> None:
        """Like `forget_text`, for texts given to `bury_texts`. kept: those that are still in use after all."""
        self._worker.run(lambda: self._ingestion.forget_texts(gone, kept, tombstone))

    def forget_text(self, text: Any) -> None:
        """Remove the caches of a text or document that was only read, unless a document has the same text."""
        document = as_document(text)
        self._worker.run(lambda: self._ingestion.forget_text(document))

    def forget_user(self, namespace: str | None = None) -> int:
        """Remove every byte of a namespace from the store: documents, memories, conversations and caches.

        Args:
            namespace: The engine's own by default.

        Returns:
            The number of cache entries removed.

        Raises:
            StoreError: The store cannot be used.
        """
        name = self.settings.namespace if namespace is None else namespace
        return self._worker.run(lambda: self._ingestion.forget_namespace(name))

    def release(self) -> None:
        """Free the buffers that are kept in memory for the next question. Stored caches stay."""
        self._worker.run(self._backend.release)

    # Conversations

    def threads(self) -> Sequence[str]:
        """The names of the conversations kept by `chat(thread=...)`."""
        self._worker.check_open()
        return self._threads.names()

    def history(self, thread: str) -> Sequence[dict[str, Any]]:
        """The messages of a conversation, the last answer included. Raises UnknownThreadError."""
        self._worker.check_open()
        return self._threads.messages(thread)

    def forget_thread(self, thread: str) -> None:
        """Remove a conversation and its caches. Raises UnknownThreadError."""

        def work() -> None:
            with self.store.database.transaction():
                spans = self._threads.remove(thread)
                tombstone = self._ingestion.bury_spans(spans)
            self._ingestion.forget_spans(spans, tombstone=tombstone)

        self._worker.run(work)

    # Lifetime

    @property
    def closed(self) -> bool:
        """Whether the engine was closed."""
        return self._worker.closed

    def close(self) -> None:
        """Cancel running answers and free the buffer, and the store unless it was handed in as an object.

        Calling it again does nothing.
        """
        if self._worker.closed:
            return
        self._worker.close()
        self._backend.close()
        if self._owns_store:
            self.store.close()
        if self._owns_model:
            self.model.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same engine: copies of a component share it."""
        return self

    def __reduce__(self) -> Any:
        raise InputError("A KVMem cannot be pickled. Pickle what it was opened with, and open it again.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
