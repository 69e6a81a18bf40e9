"""Prompts: messages, rendered with the model's own chat template and cut into spans.

Texts are tokenized separately, so they have the same ids wherever they stand. Where the tokenizer joins the ends of two
texts within a span, the tokens there are those of the whole. The texts of messages are plain text: template markup in
them is not interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from kvmem.cancellation import NEVER, Cancellation
from kvmem.errors import InputError, ModelError
from kvmem.model.base import AnyModel
from kvmem.prompt.adapt import forms
from kvmem.prompt.seam import Seams, SpanCutter
from kvmem.prompt.span import Span
from kvmem.text.chunking import KnownTexts, segment

DEFAULT_SYSTEM = "You answer questions about the documents below. Answer briefly, using only what they say."
Message = Mapping[str, Any]
# Minimum length of a message span, in tokens. Shorter ones save less than it costs to store them.
SMALLEST_SPAN = 48
# Prompts given as token ids are cut into blocks of this many tokens.
RAW_BLOCK = 128
_MARK = "\u241f"
# The thoughts of an assistant message, by the name that chat templates and servers use.
REASONING = "reasoning_content"


@dataclass(frozen=True)
class Prompt:
    """A whole prompt: the spans, then the query, which is always computed. opening: see `Layout`."""

    spans: tuple[Span, ...]
    query: tuple[int, ...]
    opening: str = ""

    @property
    def token_ids(self) -> list[int]:
        return [token for span in self.spans for token in span.token_ids] + list(self.query)

    @property
    def said(self) -> frozenset[str]:
        """Digests of the spans that do not belong to documents."""
        return frozenset(span.digest for span in self.spans if span.document is None)


@dataclass(frozen=True)
class Piece:
    """A part of a rendered prompt.

    Attributes:
        text: The text.
        markup: Whether it is template markup, in which special tokens are interpreted.
        document: Id of the document, if the piece is a chunk; it then becomes a span of its own.
    """

    text: str
    markup: bool = False
    document: str | None = None


CONTEXT = Piece("")
"""Placeholder for the documents."""


@dataclass(frozen=True)
class TemplateOptions:
    """What a chat template is given beside messages. tools: JSON schemas of functions. extra: its own variables."""

    tools: tuple[Mapping[str, Any], ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


PLAIN = TemplateOptions()


@dataclass(frozen=True)
class Layout:
    """A prompt without its documents: the spans before and after them, and the query.

    opening: the markup behind the last message, where the answer begins.
    """

    before: tuple[Span, ...]
    after: tuple[Span, ...]
    query: tuple[int, ...]
    opening: str = ""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.before)) + sum(map(len, self.after)) + len(self.query)


class Typesetter:
    """Lays out messages for one model."""

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._tokenize = lru_cache(4096)(lambda text, markup: model.tokenize(text, markup=markup))
        self._seams = Seams(model)
        self._segments = KnownTexts(lambda text, count: segment(text, count, SMALLEST_SPAN), model.count_all)

    def lay_out(
        self,
        messages: Sequence[Message],
        options: TemplateOptions = PLAIN,
        cancellation: Cancellation = NEVER,
    ) -> Layout:
        """Render `messages` and cut them into spans. Message content is a text, or a sequence of texts and `Piece`s.

        Long texts are cut at content-defined boundaries, so that a known text is recognised even if the text around it
        has changed. The query is the end of the last message and the markup after it.
        """
        pieces = self._render(messages, options)
        texts = [i for i, piece in enumerate(pieces) if not piece.markup and piece.document is None and piece.text]
        cutter = SpanCutter(self._seams)
        split_at: int | None = None
        for number, piece in enumerate(pieces):
            if piece is CONTEXT:
                cutter.break_off()
                if self._model.separator:
                    cutter.put(Span(self._model.separator))
                split_at = len(cutter.spans)
            elif piece.document is not None:
                cutter.put(self.chunk(piece.text, piece.document))
            elif piece.markup:
                cutter.add(piece.text, self._tokenize(piece.text, True), markup=True)
            else:
                # The system message stays with the template's head, which is too short to be a span.
                at_head = number <= 1 and messages[0]["role"] == "system"
                self._add_text(cutter, piece.text, at_head, number == texts[-1], cancellation)
        edge = len(cutter.spans) if split_at is None else split_at
        opening = pieces[-1].text if pieces[-1].markup else ""
        return Layout(tuple(cutter.spans[:edge]), tuple(cutter.spans[edge:]), tuple(cutter.current), opening)

    def _add_text(
        self, cutter: SpanCutter, text: str, at_head: bool, is_last: bool, cancellation: Cancellation
    ) -> None:
        parts = self._segments(text, cancellation)
        for index, part in enumerate(parts):
            ids = self._tokenize(part, False)
            if len(ids) >= SMALLEST_SPAN and not (at_head and index == 0):
                cutter.close()
            cutter.add(part, ids, markup=False)
            if len(cutter.current) >= SMALLEST_SPAN and not (is_last and index + 1 == len(parts)):
                cutter.close()

    def release(self) -> None:
        """Clear the in-memory caches."""
        self._tokenize.cache_clear()
        self._seams.between.cache_clear()
        self._segments.clear()

    def lay_out_raw(self, prompt: str | Sequence[int]) -> Layout:
        """Lay out a raw prompt, without the template: a text, in which special tokens are interpreted, or token ids."""
        if not isinstance(prompt, str):
            parts = [tuple(prompt[i : i + RAW_BLOCK]) for i in range(0, len(prompt), RAW_BLOCK)]
        else:
            parts = [self._tokenize(part, True) for part in self._segments(prompt)]
            begin = self._model.begin
            if parts[0][: len(begin)] != begin:
                parts[0] = begin + parts[0]
        return Layout((), tuple(Span(part) for part in parts[:-1]), parts[-1])

    def chunk(self, text: str, document: str) -> Span:
        """A chunk as it stands in every prompt: its text, a blank line, and the chunk separator."""
        return self.chunks([(text, document)])[0]

    def chunks(self, texts: Sequence[tuple[str, str]]) -> list[Span]:
        """Like `chunk`, for several pairs of text and document id."""
        found = self._model.tokenize_all([standing(text) for text, _ in texts], markup=False)
        return [Span((*ids, *self._model.separator), document) for ids, (_, document) in zip(found, texts, strict=True)]

    def _render(self, messages: Sequence[Message], options: TemplateOptions) -> list[Piece]:
        """The template's markup and the messages' texts, in order, in the first form that the template accepts."""
        split = [{**message, "content": as_pieces(message.get("content"))} for message in messages]
        failed: ModelError | None = None
        for form in forms(split, self._model.template.calls if _has_calls(messages) else None):
            try:
                return self._render_form(form, options)
            except ModelError as error:
                failed = failed or error
        if failed is None:
            raise AssertionError("there is always a form")
        raise failed

    def _render_form(self, messages: Sequence[Message], options: TemplateOptions) -> list[Piece]:
        """Raises ModelError if the template rejects the messages, or does not show all of their text."""
        contents: list[Piece] = []
        optional: set[int] = set()

        def mark(pieces: Iterable[Piece]) -> str:
            text = ""
            for part in pieces:
                if part.text or part is CONTEXT:
                    text += f"{_MARK}{len(contents)}{_MARK}"
                    contents.append(part)
            return text

        marked = []
        for message in messages:
            thought = message.get(REASONING)
            given = {}
            if isinstance(thought, str) and thought:
                # The template decides whose thoughts are shown.
                optional.add(len(contents))
                given[REASONING] = mark([Piece(thought)])
            marked.append({**message, "content": mark(as_pieces(message["content"])), **given})
        parts = re.split(f"{_MARK}(\\d+){_MARK}", self._model.render(marked, options.tools, options.extra))
        shown = [int(number) for number in parts[1::2]]
        if [n for n in range(len(contents)) if n in shown or n not in optional] != shown:
            raise ModelError(
                f"The chat template of {self._model.name!r} does not render the text of every message exactly once and "
                "in order. Set another tokenizer.chat_template."
            )
        pieces = [Piece(parts[0], markup=True)]
        for number, text in zip(shown, parts[2::2], strict=True):
            pieces += [contents[number], Piece(text, markup=True)]
        return [piece for piece in pieces if piece.text or piece is CONTEXT]


def _has_calls(messages: Sequence[Message]) -> bool:
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def as_pieces(content: Any) -> list[Piece]:
    """The content of a message as pieces. Raises InputError."""
    if content is None:
        return []
    if isinstance(content, (str, Piece)):
        content = [content]
    if not isinstance(content, Iterable):
        raise InputError(f"The content of a message is of type {type(content).__name__}. Give a str.")
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
            raise InputError(f"A message has content of type {kind!r}, but kvmem only reads text. Give text.")
    return pieces


def standing(text: str) -> str:
    return text.strip("\n") + "\n\n"
