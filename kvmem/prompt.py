"""Prompt: the model's chat template, cut into prefix, chunks and query.

Each part is tokenised by itself and the ids are joined, so a chunk has the same ids wherever it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvmem.entry import digest_tokens
from kvmem.errors import ModelError
from kvmem.model import LanguageModel

DEFAULT_SYSTEM = "You answer questions about the documents below. Answer briefly, using only what they say."
_CONTEXT_MARK = "\u241fcontext\u241f"
_QUESTION_MARK = "\u241fquestion\u241f"


@dataclass(frozen=True)
class Span:
    """A piece of a prompt that is cached as a whole. document: None for the prefix."""

    token_ids: tuple[int, ...]
    document: str | None = None

    @cached_property
    def digest(self) -> str:
        return digest_tokens(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Frame:
    """The chat template for one system prompt: `prefix` before the chunks, `before` and `after` the question."""

    prefix: Span
    before: str
    after: str


@dataclass(frozen=True)
class Prompt:
    """prefix, chunks and query, in this order, are the whole prompt."""

    prefix: Span
    chunks: tuple[Span, ...]
    query: tuple[int, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is cached: the prefix and the chunks."""
        return self.prefix, *self.chunks

    @property
    def token_ids(self) -> list[int]:
        return [token for span in self.spans for token in span.token_ids] + list(self.query)


def make_frame(model: LanguageModel, system: str) -> Frame:
    """Cut the template of `model` around the places of the chunks and of the question."""
    text = model.render(
        [
            {"role": "system", "content": f"{system}\n\n{_CONTEXT_MARK}"},
            {"role": "user", "content": _QUESTION_MARK},
        ]
    )
    if text.count(_CONTEXT_MARK) != 1 or text.count(_QUESTION_MARK) != 1:
        raise ModelError(
            f"The chat template of {model.name!r} does not show the system and user text once each. "
            "Set another tokenizer.chat_template."
        )
    head, rest = text.split(_CONTEXT_MARK)
    before, after = rest.split(_QUESTION_MARK)
    return Frame(Span(model.tokenize(head, markup=True)), before, after)


def chunk_span(model: LanguageModel, text: str, document: str) -> Span:
    """A chunk as it stands in every prompt: its text and a blank line."""
    return Span(model.tokenize(text.strip("\n") + "\n\n", markup=False), document)


def query_ids(model: LanguageModel, frame: Frame, question: str) -> tuple[int, ...]:
    """The question with what the template puts around it; markup in the question itself is plain text."""
    return (
        *model.tokenize(frame.before, markup=True),
        *model.tokenize(question, markup=False),
        *model.tokenize(frame.after, markup=True),
    )
