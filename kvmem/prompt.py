"""Prompt: messages, rendered by the model's own chat template and cut into spans.

Each span is tokenised by itself and the ids are joined, so a text has the same ids wherever it stands. Texts of
messages are plain text: markup of the template written in them stays what it is, text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from kvmem.any_model import AnyModel
from kvmem.entry import digest_tokens
from kvmem.errors import InputError, ModelError
from kvmem.split import KnownTexts, segment

DEFAULT_SYSTEM = "You answer questions about the documents below. Answer briefly, using only what they say."
Message = Mapping[str, Any]
# Spans of messages are at least so long: shorter ones save less than they cost to keep.
SMALLEST_SPAN = 48
# Prompts that come as token ids are cut into blocks of so many.
RAW_BLOCK = 128
_MARK = "\u241f"


@dataclass(frozen=True)
class Span:
    """A piece of a prompt that is cached as a whole. document: None for what is not of a document."""

    token_ids: tuple[int, ...]
    document: str | None = None

    @cached_property
    def digest(self) -> str:
        return digest_tokens(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Prompt:
    """The spans, and behind them the query, which is read anew, are the whole prompt."""

    spans: tuple[Span, ...]
    query: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token for span in self.spans for token in span.token_ids] + list(self.query)

    @property
    def said(self) -> frozenset[str]:
        """Digests of the spans that are not of documents."""
        return frozenset(span.digest for span in self.spans if span.document is None)


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered prompt. markup: of the template, so special tokens in it are meant. document: its id,
    if it is a chunk of one; it is a span of its own then."""

    text: str
    markup: bool = False
    document: str | None = None


CONTEXT = Piece("")
"""Stands where documents of the corpus go."""


@dataclass(frozen=True)
class Layout:
    """A prompt without its context: spans before and behind it, and the query."""

    before: tuple[Span, ...]
    after: tuple[Span, ...]
    query: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.before)) + sum(map(len, self.after)) + len(self.query)


class Typesetter:
    """Lays out messages for one model."""

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._tokenize = lru_cache(4096)(lambda text, markup: model.tokenize(text, markup=markup))
        self._segments = KnownTexts(lambda text: segment(text, model.count_all, SMALLEST_SPAN))

    def lay_out(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Layout:
        """Render `messages` and cut them. A message's content is a text, or a sequence of texts and `Piece`s.

        Long texts are cut at content-defined places, so that a text which was seen before is found again even when
        what stands around it has changed. The end of the last message and what the template puts behind it are the
        query.
        """
        pieces = self._render(messages, tools)
        texts = [i for i, piece in enumerate(pieces) if not piece.markup and piece.document is None and piece.text]
        spans: list[Span] = []
        current: list[int] = []
        split_at: int | None = None

        def close() -> None:
            if current:
                spans.append(Span(tuple(current)))
                current.clear()

        for number, piece in enumerate(pieces):
            if piece is CONTEXT or piece.document is not None:
                close()
            if piece is CONTEXT:
                if self._model.separator:
                    spans.append(Span(self._model.separator))
                split_at = len(spans)
            elif piece.document is not None:
                spans.append(self.chunk(piece.text, piece.document))
            elif piece.markup:
                current += self._tokenize(piece.text, True)
            else:
                parts = self._segments(piece.text)
                for index, part in enumerate(parts):
                    ids = self._tokenize(part, False)
                    # A system message stays with the head of the template, which is nothing by itself.
                    at_head = number <= 1 and index == 0 and messages[0]["role"] == "system"
                    if len(ids) >= SMALLEST_SPAN and not at_head:
                        close()
                    current += ids
                    last = number == texts[-1] and index + 1 == len(parts)
                    if len(current) >= SMALLEST_SPAN and not last:
                        close()
        edge = len(spans) if split_at is None else split_at
        return Layout(tuple(spans[:edge]), tuple(spans[edge:]), tuple(current))

    def release(self) -> None:
        """Forget what is kept in memory."""
        self._tokenize.cache_clear()
        self._segments.clear()

    def lay_out_raw(self, prompt: str | Sequence[int]) -> Layout:
        """A prompt as it is, without the template: a text, whose special tokens are meant, or token ids."""
        if not isinstance(prompt, str):
            parts = [tuple(prompt[i : i + RAW_BLOCK]) for i in range(0, len(prompt), RAW_BLOCK)]
        else:
            parts = [self._tokenize(part, True) for part in self._segments(prompt)]
            begin = self._model.begin
            if parts[0][: len(begin)] != begin:
                parts[0] = begin + parts[0]
        return Layout((), tuple(Span(part) for part in parts[:-1]), parts[-1])

    def chunk(self, text: str, document: str) -> Span:
        """A chunk of a document as it stands in every prompt: its text, a blank line, and what has to part chunks."""
        return self.chunks([(text, document)])[0]

    def chunks(self, texts: Sequence[tuple[str, str]]) -> list[Span]:
        """Chunks as `chunk` sets them: of each its text, and the document that it is of."""
        found = self._model.tokenize_all([_standing(text) for text, _ in texts], markup=False)
        return [Span((*ids, *self._model.separator), document) for ids, (_, document) in zip(found, texts, strict=True)]

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Piece]:
        """The template's text and the messages' own, in order."""
        contents: list[Piece] = []
        marked = []
        for message in messages:
            text = ""
            for part in as_pieces(message.get("content")):
                if part.text or part is CONTEXT:
                    text += f"{_MARK}{len(contents)}{_MARK}"
                    contents.append(part)
            marked.append({**message, "content": text})
        parts = re.split(f"{_MARK}(\\d+){_MARK}", self._model.render(marked, tools))
        if [int(n) for n in parts[1::2]] != list(range(len(contents))):
            raise ModelError(
                f"The chat template of {self._model.name!r} does not show every message's text once and in order. "
                "Set another tokenizer.chat_template."
            )
        pieces = [Piece(parts[0], markup=True)]
        for number, text in zip(parts[1::2], parts[2::2], strict=True):
            pieces += [contents[int(number)], Piece(text, markup=True)]
        return [piece for piece in pieces if piece.text or piece is CONTEXT]


def as_pieces(content: Any) -> list[Piece]:
    """The content of a message as pieces. Raises InputError."""
    if content is None:
        return []
    if isinstance(content, (str, Piece)):
        content = [content]
    if not isinstance(content, Iterable):
        raise InputError(f"The content of a message is a {type(content).__name__}. Give a text.")
    pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append(Piece(part))
        elif isinstance(part, Piece):
            pieces.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces.append(Piece(part["text"]))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"A message holds content of type {kind!r}; this model reads text. Give text.")
    return pieces


def _standing(text: str) -> str:
    return text.strip("\n") + "\n\n"
