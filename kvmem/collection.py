"""Collection: documents of an engine under a name of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvmem.cancellation import Cancellation
from kvmem.errors import InputError
from kvmem.ingest import Ingestion, Progress
from kvmem.library.corpus import Corpus
from kvmem.prompt.layout import Message
from kvmem.runtime.worker import Worker
from kvmem.text.document import Chunk, Document, Metadata, as_document, named_by_all

if TYPE_CHECKING:
    from kvmem.engine import KVMem

T = TypeVar("T")


class Collection:
    """A set of documents to answer from, apart from all others of its engine. May be used from any thread.

    Made by `KVMem.collection`. Ids are unique within a collection. Text that several collections share is computed and
    stored once. `KVMem.ask`, `chat` and the others answer from a collection when it is given as `collection=`.

    Attributes:
        mem: the engine.
        name: of the collection in the store; "" for the engine's own documents, None for one kept in memory only.

    Example:
        ```python
        handbook = mem.collection("handbook")
        handbook.add("The office opens at nine.", id="hours")
        print(mem.ask("When does the office open?", collection=handbook).text)
        ```
    """

    def __init__(self, mem: KVMem, corpus: Corpus, name: str | None, ingestion: Ingestion, worker: Worker) -> None:
        self.mem, self.name = mem, name
        self._corpus, self._ingestion, self._worker = corpus, ingestion, worker

    @property
    def corpus(self) -> Corpus:
        """The documents as the engine sees them."""
        return self._corpus

    def add(
        self,
        document: Any,
        id: str | None = None,  # noqa: A002
        metadata: Metadata | None = None,
        *,
        read: bool = True,
        prompt: Sequence[Message] | None = None,
        cancellation: Cancellation | None = None,
    ) -> Document:
        """Read a document and keep it; one of the same id is replaced, and only what changed is read.

        Args:
            document: a text, a `pathlib.Path` (text, Markdown, HTML, PDF), a `Document`, or a document of LangChain or
                LlamaIndex.
            id: its id; by default the document's own, the path, or a digest of the text.
            metadata: JSON; added to the document's own.
            read: whether to compute its caches now; if not, the first prompt that needs them does.
            prompt: the messages that the documents will stand in, with `kvmem.prompt.CONTEXT` in their place; by
                default those of `ask`. Documents are computed behind what precedes them there.
            cancellation: ends reading early.

        Raises:
            InputError: the documents are unchanged then.
            EmptyInputError: a text, the question or the documents are empty.
            ClosedError: the engine was closed or the work cancelled.
            AnswerTimeoutError: the timeout passed.
        """
        new = self._ingestion.check(as_document(document, id, metadata))
        return self._run(lambda stop: self._ingestion.add(self._corpus, [new], stop, read, prompt)[0], cancellation)

    def add_all(
        self,
        documents: Iterable[Any],
        progress: Progress | None = None,
        *,
        read: bool = True,
        prompt: Sequence[Message] | None = None,
    ) -> Sequence[Document]:
        """Add many documents, as `add` takes them. All are checked before any is added.

        Args:
            progress: called with each document when it is there, its number from 1, and how many there are.
            read: as in `add`.
            prompt: as in `add`.

        What was added before an interruption stays, and costs nothing when all are given again.

        Raises:
            InputError: also for two different documents of one id.
            EmptyInputError: a text, the question or the documents are empty.
        """
        found = list(self._checked(documents).values())
        added: list[Document] = []
        for group in self._ingestion.groups(found):
            work: Callable[[Cancellation], list[Document]] = partial(self._add_group, group, read, prompt)
            for document in self._run(work):
                added.append(document)
                if progress is not None:
                    progress(document, len(added), len(found))
        return added

    def _add_group(
        self, group: list[Document], read: bool, prompt: Sequence[Message] | None, cancellation: Cancellation
    ) -> list[Document]:
        return self._ingestion.add(self._corpus, group, cancellation, read, prompt)

    def _checked(self, documents: Iterable[Any]) -> dict[str, Document]:
        if isinstance(documents, (str, bytes, os.PathLike, Document)) or not isinstance(documents, Iterable):
            raise InputError(f"documents is a {type(documents).__name__}. Give a list, or use add().")
        found: dict[str, Document] = {}
        for item in documents:
            new = self._ingestion.check(as_document(item))
            if found.get(new.id, new) != new:
                new = named_by_all(new)
            if found.setdefault(new.id, new) != new:
                raise InputError(f"Two different documents have the id {new.id!r}. Give each its own.")
        return found

    def set_all(
        self,
        documents: Iterable[Any],
        progress: Progress | None = None,
        *,
        read: bool = True,
        prompt: Sequence[Message] | None = None,
    ) -> Sequence[Document]:
        """Add documents, and remove those that are not given. Arguments and errors as in `add_all`."""
        given = list(documents)
        wanted = self._checked(given)
        added = self.add_all(given, progress, read=read, prompt=prompt)
        self._worker.run(lambda: self._ingestion.keep_only(self._corpus, wanted))
        return added

    def update(self, id: str, document: Any, metadata: Metadata | None = None) -> Document:  # noqa: A002
        """Replace a document that is there; only what changed is read. A text keeps the metadata unless some is given.

        Raises:
            UnknownDocumentError: there is no document with that id.
            InputError: an argument cannot be used.
            EmptyInputError: a text, the question or the documents are empty.
        """
        if isinstance(document, str) and metadata is None:
            metadata = self.get(id).metadata
        new = self._ingestion.check(as_document(document, id, metadata))
        return self._run(lambda stop: self._ingestion.update(self._corpus, new, stop))

    def get(self, id: str) -> Document:  # noqa: A002
        """The document. Raises UnknownDocumentError."""
        self._worker.check_open()
        return self._corpus.get(id)

    def list(self) -> Sequence[Document]:
        """All documents, in the order they were added."""
        self._worker.check_open()
        return tuple(self._corpus)

    def split(self, text: str) -> tuple[str, ...]:
        """The chunks that a text is cut into when it is added."""
        return self._ingestion.split(text)

    def chunks(self) -> Sequence[Chunk]:
        """The chunks of all documents, in order."""
        self._worker.check_open()
        return tuple(self._corpus.chunks())

    def __len__(self) -> int:
        self._worker.check_open()
        return len(self._corpus)

    def remove(self, *ids: str) -> None:
        """Remove documents, and every cache of text that no other document has.

        Raises:
            UnknownDocumentError: nothing is removed then.
        """
        if ids:
            self._worker.run(lambda: self._ingestion.remove(self._corpus, ids))

    def clear(self) -> None:
        """Remove every document of this collection."""
        self._worker.run(lambda: self._ingestion.keep_only(self._corpus, ()))

    def _run(self, work: Callable[[Cancellation], T], cancellation: Cancellation | None = None) -> T:
        """Run work that stops when it is cancelled, or when the engine is closed."""
        if cancellation is None:
            return self._worker.run(lambda: work(self._worker.closing))
        with self._worker.closing.calling(cancellation.cancel):
            return self._worker.run(lambda: work(cancellation))
