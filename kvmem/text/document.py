"""Documents, and converting users' data to documents."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmem.errors import EmptyInputError, InputError
from kvmem.text.loaders import read_file

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text with an id.

    Attributes:
        id: Unique within the namespace.
        text: The text.
        metadata: JSON-serialisable values. `title` is shown before each chunk in a prompt.
        chunks: The chunks of `text`, if it is already cut; they must concatenate to `text`. Empty: kvmem cuts it.
        heading: Stands before every chunk in a prompt. None: the title and the Markdown headings each chunk is under.

    Example:
        ```python
        from kvmem import Document, KVMem

        with KVMem("smollm2", store="./kv") as mem:
            mem.add(Document("lease", "The lease begins on 1 April.", {"title": "Lease of Harbour Road"}))
            print(mem.ask("When does the lease begin?").text)
        ```
    """

    id: str
    text: str
    metadata: Metadata = field(default_factory=dict)
    chunks: tuple[str, ...] = ()
    heading: str | None = None


@dataclass(frozen=True)
class Chunk:
    """One piece of a document.

    Attributes:
        text: The text of the chunk.
        document_id: Id of the document.
        index: Position of the chunk in the document, from 0.
        metadata: Metadata of the document.
        heading: Text placed before the chunk in a prompt: the title and the headings it is under, or "".
    """

    text: str
    document_id: str
    index: int
    metadata: Metadata
    heading: str = ""


def as_document(value: Any, id: str | None = None, metadata: Metadata | None = None) -> Document:  # noqa: A002
    """Make a document from a text, a `pathlib.Path`, a `Document`, or a LangChain or LlamaIndex document.

    Without an id, a path is its own id, and a text (or a document with a random UUID) gets a digest of its content.
    Raises InputError, EmptyInputError.
    """
    own: Metadata = {}
    chunks: tuple[str, ...] = ()
    heading: str | None = None
    if isinstance(value, Document):
        text, own, found, chunks, heading = value.text, value.metadata, value.id, value.chunks, value.heading
    elif isinstance(value, str):
        text, found = value, None
    elif isinstance(value, Path):
        text, own = read_file(value)
        found = value.as_posix()
    elif hasattr(value, "page_content"):
        text, own, found = value.page_content, value.metadata, getattr(value, "id", None)
    elif hasattr(value, "get_content") and hasattr(value, "metadata"):
        text, own = value.get_content(), value.metadata
        found = chosen_id(getattr(value, "id_", None) or getattr(value, "node_id", None))
    else:
        raise InputError(
            f"A document cannot be made from {type(value).__name__}. "
            "Give a str, a pathlib.Path, or a LangChain or LlamaIndex document."
        )
    if not isinstance(text, str) or not text.strip():
        which = f"The document {found!r}" if found is not None else "The document"
        raise EmptyInputError(f"{which} has no text. Give a text with at least one word.")
    check_text(text, "The document")
    merged = dict(own) | dict(metadata or {})
    try:
        merged = json.loads(json.dumps(merged))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The metadata cannot be serialised as JSON: {error}. "
            "Use strings, numbers, booleans, lists and mappings with string keys."
        ) from None
    check_text(json.dumps(merged, ensure_ascii=False), "The metadata")
    name = id if id is not None else found
    if name is None:
        name = _digest(text)
    if not isinstance(name, str) or not name:
        raise InputError(f"id={name!r} is not valid. Give a non-empty string, or None.")
    check_text(name, "The id")
    return Document(name, text, merged, chunks, heading)


def named_by_all(document: Document) -> Document:
    """If the document's id is a digest of its text, replace it with a digest of text and metadata."""
    if document.id != _digest(document.text):
        return document
    return replace(document, id=_digest(json.dumps([document.text, document.metadata], sort_keys=True)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chosen_id(name: str | None) -> str | None:
    """`name`, or None for a random UUID: LlamaIndex makes one per document, which would store equal texts twice."""
    try:
        return None if name is None or uuid.UUID(name).version == 4 else name
    except ValueError:
        return name


def check_text(text: str, what: str) -> None:
    """Raise InputError if `text` cannot be encoded, for example because of a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode: {error}. Decode it with errors='replace'.") from None
