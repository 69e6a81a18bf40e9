"""Documents, and cutting them into chunks at natural ends."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmem.errors import EmptyInputError, InputError
from kvmem.settings import SplitSettings

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
    """One piece of a document; `index` counts from 0 within the document."""

    text: str
    document_id: str
    index: int
    metadata: Metadata


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
        text, found, own = read_text(value), value.as_posix(), {"source": str(value)}
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
        raise EmptyInputError("The document has no text. Give a text with at least one word.")
    check_text(text, "The document")
    merged = dict(own) | dict(metadata or {})
    try:
        merged = json.loads(json.dumps(merged))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The metadata is not JSON: {error}. Use text, numbers, booleans, lists and mappings of text."
        ) from None
    name = id if id is not None else found
    if name is None:
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
    if not isinstance(name, str) or not name:
        raise InputError(f"id={name!r} cannot be used. Give a text that is not empty, or None.")
    return Document(name, text, merged, chunks)


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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError when it cannot be read as text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}. Give a text file.") from error
    if "\0" in text:
        raise InputError(f"{path} holds binary data. Give a text file.")
    return text


# Where a text may be cut, strongest first: before a heading, after a blank line, after a line, after a sentence.
_CUTS = (
    re.compile(r"(?<=\n)(?=#{1,6} )"),
    re.compile(r"(?<=\n)[ \t]*\n+"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?;])[ \t]+|(?<=[。！？；])"),
)
_WORDS = re.compile(r"\s+")


def split(text: str, count_tokens: Callable[[str], int], settings: SplitSettings) -> tuple[str, ...]:
    """Cut `text` into chunks that concatenate to it, each at most `settings.maximum` tokens.

    Of the possible ends between the minimum and the maximum size, the strongest is taken; among equals, the
    one whose surrounding text has the smallest digest, so that cuts find back to the same places behind an
    edit (content-defined chunking as in LBFS, SOSP'01).
    """
    atoms = _atoms(text, count_tokens, settings.maximum)
    chunks: list[str] = []
    first = 0
    while first < len(atoms):
        last = _end_of_chunk(atoms, first, settings)
        chunks.append("".join(atom.text for atom in atoms[first:last]))
        first = last
    return tuple(chunks)


def segment(text: str, count_tokens: Callable[[str], int], minimum: int) -> tuple[str, ...]:
    """Cut `text` where a text inside it, wherever it stands, would be cut too; the pieces concatenate to it.

    Every paragraph of `minimum` tokens is a piece of its own; shorter ones are joined with each other. Long paragraphs
    are cut at ends of lines and sentences that are chosen by their surrounding text alone, and at the latest where
    `split` would.
    """
    pieces: list[str] = []
    small, size = "", 0
    for part, tokens in _paragraphs(_atoms(text, count_tokens, _LONGEST_PIECE)):
        if tokens >= minimum and small:
            pieces.append(small)
            small, size = "", 0
        small, size = small + part, size + tokens
        if size >= minimum:
            pieces.append(small)
            small, size = "", 0
    return (*pieces, small) if small else tuple(pieces)


def _paragraphs(atoms: Sequence[_Atom]) -> Iterator[tuple[str, int]]:
    """Paragraphs, and pieces of long ones, with their tokens."""
    part, size = "", 0
    for index, atom in enumerate(atoms):
        part, size = part + atom.text, size + atom.tokens
        following = atoms[index + 1] if index + 1 < len(atoms) else None
        chosen = following is not None and size >= _LONG_PIECE and _digest(atom.text + following.text)[0] in "0123"
        full = following is not None and size + following.tokens > _LONGEST_PIECE
        if following is None or atom.strength >= _BLANK_LINE or chosen or full:
            yield part, size
            part, size = "", 0


_BLANK_LINE = 2
_LONG_PIECE, _LONGEST_PIECE = 192, 512


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Atom:
    """A piece that is never cut. strength: how natural it is to cut after it, higher is better."""

    text: str
    tokens: int
    strength: int


def _end_of_chunk(atoms: Sequence[_Atom], first: int, settings: SplitSettings) -> int:
    size, best, best_rank = 0, first + 1, (-1, "")
    for index in range(first, len(atoms)):
        size += atoms[index].tokens
        if size > settings.maximum:
            break
        if index + 1 == len(atoms):
            return len(atoms)
        if size >= settings.minimum:
            around = atoms[index].text + atoms[index + 1].text
            rank = (atoms[index].strength, _digest(around))
            if rank > best_rank:
                best, best_rank = index + 1, rank
        elif best_rank == (-1, ""):
            best = index + 1
    return best


def _atoms(text: str, count_tokens: Callable[[str], int], maximum: int) -> list[_Atom]:
    ends: dict[int, int] = {}
    for strength, pattern in enumerate(reversed(_CUTS)):
        for match in pattern.finditer(text):
            ends[match.end()] = strength
    atoms: list[_Atom] = []
    start = 0
    for end in sorted({*ends, len(text)}):
        if end > start:
            atoms += _fit(text[start:end], ends.get(end, 0), count_tokens, maximum)
            start = end
    return atoms


def _fit(text: str, strength: int, count_tokens: Callable[[str], int], maximum: int) -> list[_Atom]:
    """`text` as one atom, or as several when it is longer than `maximum` tokens."""
    size = count_tokens(text)
    if size <= maximum or len(text) == 1:
        return [_Atom(text, size, strength)]
    middle = len(text) // 2
    spaces = [m.end() for m in _WORDS.finditer(text) if 0 < m.end() < len(text)]
    cut = min(spaces, key=lambda s: abs(s - middle)) if spaces else middle
    left = _fit(text[:cut], 0, count_tokens, maximum)
    return left + _fit(text[cut:], strength, count_tokens, maximum)
