"""Scope: the texts from which a prompt is answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvmem.errors import InputError
from kvmem.library.corpus import Corpus, DocumentFilter
from kvmem.text.document import Document
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
