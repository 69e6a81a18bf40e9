"""Scope: the texts from which a prompt is answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvmem.cancellation import Cancellation
from kvmem.errors import InputError
from kvmem.library.corpus import Chunker, Corpus, DocumentFilter
from kvmem.library.selection import Selection
from kvmem.results import Source
from kvmem.text.document import Chunk, Document, as_document
from kvmem.text.retrieval import Retriever

ContextTexts = Iterable[Any] | None


@dataclass(frozen=True, eq=False)
class Scope:
    """The texts from which a prompt is answered.

    Attributes:
        corpus: The documents of a collection.
        documents: Ids of the documents to use, or a filter over their metadata; None uses all documents.
        context: Texts, documents or sources to use instead of the corpus; None uses the corpus.
        retriever: Chooses chunks if they do not all fit; None uses the engine's retriever.
    """

    corpus: Corpus
    documents: DocumentFilter | None = None
    context: ContextTexts = None
    retriever: Retriever | None = None


def check_context(context: Iterable[Any]) -> Iterable[Any]:
    """Return `context` if it is a collection of texts or documents. Raises InputError."""
    if isinstance(context, (str, bytes, Document)) or not isinstance(context, Iterable):
        raise InputError(f"context is a single {type(context).__name__}. Give a list of texts or documents.")
    return context


def select(scope: Scope, chunker: Chunker, cancellation: Cancellation) -> Selection:
    """The chunks of a scope. Raises InputError."""
    if scope.context is None:
        return scope.corpus.select(scope.documents)
    if scope.documents is not None:
        raise InputError("context and documents cannot be combined. Give one of them.")
    chunks: list[Chunk] = []
    known: dict[tuple[str, int, str], Chunk] = {}
    for item in check_context(scope.context):
        if not isinstance(item, Source):
            chunks += chunker.chunks_of(chunker.split(as_document(item), cancellation))
            continue
        known = known or {(c.document_id, c.index, c.text): c for c in scope.corpus.chunks()}
        chunk = known.get((item.document_id, item.index, item.text))
        if chunk is None:
            raise InputError(
                f"Chunk {item.index} of document {item.document_id!r} is no longer in the corpus. "
                "Call retrieve() again, or give the text."
            )
        chunks.append(chunk)
    return Selection(chunks, chunker.sizes(chunks))


def nothing_in(scope: Scope) -> str:
    """What to do about a scope without chunks."""
    if scope.context is None and scope.documents is not None and len(scope.corpus):
        return "There is nothing to answer from: no document matches documents=. Change the filter or the ids."
    return (
        "There is nothing to answer from: the corpus is empty. Call add() with a document first, "
        "or pass texts as context=[...]."
    )
