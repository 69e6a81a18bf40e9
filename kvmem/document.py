"""Documents, and making them from what users have."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmem.errors import EmptyInputError, InputError
from kvmem.files import read_file

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text with an id. `chunks` concatenate to `text`; `metadata` is JSON."""

    id: str
    text: str
    metadata: Metadata = field(default_factory=dict)
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """One piece of a document; `index` counts from 0 within the document.

    heading: what stands before the text in a prompt: the title and the headings that the piece is under, or nothing.
    """

    text: str
    document_id: str
    index: int
    metadata: Metadata
    heading: str = ""


def as_document(value: Any, id: str | None = None, metadata: Metadata | None = None) -> Document:  # noqa: A002
    """A document from a text, a `pathlib.Path`, a `Document`, or a LangChain or LlamaIndex document.

    Without an id, a path gives itself and a text (or a document with a random UUID) a digest of its content.
    Raises InputError, EmptyInputError.
    """
    own: Metadata = {}
    chunks: tuple[str, ...] = ()
    if isinstance(value, Document):
        text, own, found, chunks = value.text, value.metadata, value.id, value.chunks
    elif isinstance(value, str):
        text, found = value, None
    elif isinstance(value, Path):
        text, own = read_file(value)
        found = value.as_posix()
    elif hasattr(value, "page_content"):
        text, own, found = value.page_content, value.metadata, getattr(value, "id", None)
    elif hasattr(value, "get_content") and hasattr(value, "metadata"):
        text, own = value.get_content(), value.metadata
        found = _chosen(getattr(value, "id_", None) or getattr(value, "node_id", None))
    else:
        raise InputError(
            f"A document cannot be made from {type(value).__name__}. "
            "Give a str, a pathlib.Path, or a document of LangChain or LlamaIndex."
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
            f"The metadata is not JSON: {error}. Use text, numbers, booleans, lists and mappings of text."
        ) from None
    check_text(json.dumps(merged, ensure_ascii=False), "The metadata")
    name = id if id is not None else found
    if name is None:
        name = _digest(text)
    if not isinstance(name, str) or not name:
        raise InputError(f"id={name!r} cannot be used. Give a text that is not empty, or None.")
    check_text(name, "The id")
    return Document(name, text, merged, chunks)


def named_by_all(document: Document) -> Document:
    """A document that is named by its text, named by its metadata as well; any other as it is."""
    if document.id != _digest(document.text):
        return document
    return replace(document, id=_digest(json.dumps([document.text, document.metadata], sort_keys=True)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(name: str | None) -> str | None:
    """`name` unless it is random: LlamaIndex gives every document a new one, and the same text would pile up."""
    try:
        return None if name is None or uuid.UUID(name).version == 4 else name
    except ValueError:
        return name


def check_text(text: str, what: str) -> None:
    """Raise InputError when `text` cannot be encoded (half a surrogate pair, for example)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode: {error}. Decode it with errors='replace'.") from None
