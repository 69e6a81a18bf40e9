"""From messages to a checked and planned prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from kvmem.answer import Source
from kvmem.any_model import AnyModel
from kvmem.corpus import Corpus
from kvmem.document import Chunk, Document, as_document, check_text
from kvmem.errors import EmptyInputError, InputError, PromptTooLongError
from kvmem.plan import Plan, make_plan
from kvmem.prompt import CONTEXT, DEFAULT_SYSTEM, Layout, Message, Piece, Prompt, Span, Typesetter, as_pieces
from kvmem.retrieve import Retriever
from kvmem.settings import Settings

Context = Iterable[Any] | None


@dataclass(frozen=True, eq=False)
class Request:
    """A question, checked, with its prompt planned. started, prepared: `time.perf_counter` seconds."""

    started: float
    prompt: Prompt
    plan: Plan
    sources: tuple[Source, ...]
    prepared: float


class RequestBuilder:
    """Builds requests over one corpus.

    arrange: as `Backend.arrange`. reorders: whether chunks are arranged even if all of them fit, since what stands
        elsewhere would be read anew.
    """

    def __init__(
        self,
        model: AnyModel,
        corpus: Corpus,
        typesetter: Typesetter,
        retriever: Retriever,
        arrange: Callable[[Sequence[Span], Sequence[Sequence[Span]]], Sequence[int]],
        settings: Settings,
        reorders: bool = False,
    ) -> None:
        self._reorders = reorders
        self._model, self._corpus, self._retriever, self._settings = model, corpus, retriever, settings
        self._typesetter, self._arranged = typesetter, arrange

    def prefix(self, system: str | None) -> tuple[Span, ...]:
        """What stands before the documents; None is the system prompt of the settings."""
        return prefix_of(self._typesetter, self._system(system))

    def for_question(
        self, started: float, question: str, context: Context, system: str | None, answer_tokens: int
    ) -> Request:
        """A request to answer from the corpus, or from `context`."""
        self._check_question(question)
        chunks = self._corpus.chunks() if context is None else self.context_chunks(context)
        if not chunks:
            raise EmptyInputError(
                "There is nothing to answer from: the corpus is empty. add() a document first, "
                "or pass texts as context=[...]."
            )
        return self._build(started, self._question(question, system), question, chunks, answer_tokens, None)

    def retrieve(self, question: str, k: int) -> tuple[Source, ...]:
        """The `k` best chunks of the corpus, best first."""
        self._check_question(question)
        if k < 1:
            raise InputError(f"k={k} asks for nothing. Give 1 or more.")
        chunks = self._corpus.chunks()
        scores = self._retriever.score(question, chunks)
        best = sorted(range(len(chunks)), key=lambda i: (-scores[i], i))[:k]
        found = ((chunks[i], scores[i]) for i in best if scores[i] > 0)
        return tuple(Source(c.document_id, c.index, c.text, deepcopy(c.metadata), score) for c, score in found)

    def for_messages(
        self,
        started: float,
        messages: Sequence[Message],
        context: Context,
        answer_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Request:
        """A request to continue a conversation; `context` goes to the end of its system message."""
        checked = check_messages(messages)
        asked = next((text for m in reversed(checked) if (text := text_of(m))), "")
        if not asked:
            raise EmptyInputError("The messages have no text. Say something.")
        chunks = [] if context is None else self.context_chunks(context)
        if chunks:
            checked = self._with_context(checked)
        return self._build(started, checked, asked, chunks, answer_tokens, tools)

    def for_raw(self, started: float, prompt: str | Sequence[int], answer_tokens: int) -> Request:
        """A request to continue a prompt as it is."""
        if isinstance(prompt, str):
            check_text(prompt, "The prompt")
        elif not isinstance(prompt, Sequence):
            raise InputError(f"The prompt is a {type(prompt).__name__}. Give a text, or token ids.")
        elif not all(isinstance(token, int) and 0 <= token < self._model.vocabulary for token in prompt):
            raise InputError(f"The prompt is no list of token ids in [0, {self._model.vocabulary}). Use this model's.")
        if not prompt:
            raise EmptyInputError("The prompt is empty. Write something.")
        self._check_size(len(prompt) if isinstance(prompt, str) else 0)
        layout = self._typesetter.lay_out_raw(prompt)
        plan = make_plan(
            prefix=0, chunks=(), query=layout.tokens, answer=answer_tokens, window=self._model.window, scores=tuple
        )
        return Request(started, Prompt(layout.after, layout.query), plan, (), time.perf_counter())

    def _check_question(self, question: str) -> None:
        if not isinstance(question, str):
            raise InputError(f"The question is a {type(question).__name__}. Give a str.")
        check_text(question, "The question")
        if not question.strip():
            raise EmptyInputError("The question is empty. Ask something.")

    def _question(self, question: str, system: str | None) -> list[Message]:
        return _ask(question, self._system(system))

    def _system(self, system: str | None) -> str:
        return next(s for s in (system, self._settings.system, DEFAULT_SYSTEM) if s is not None)

    def _with_context(self, messages: list[Message]) -> list[Message]:
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": [self._system(None) + "\n\n", CONTEXT]}, *messages]
        # One text with what stands before it, as in `_question`: tokens may reach over the edge.
        *pieces, last = as_pieces(messages[0]["content"]) or [Piece("")]
        ending = [Piece(last.text + "\n\n")] if last.document is None else [last, Piece("\n\n")]
        content = [*pieces, *ending, CONTEXT]
        return [{**messages[0], "content": content}, *messages[1:]]

    def _build(
        self,
        started: float,
        messages: list[Message],
        question: str,
        chunks: Sequence[Chunk],
        answer_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Request:
        spans = self._corpus.spans(chunks)
        layout, dropped = self._trim(messages, sum(map(len, spans)), answer_tokens, tools)
        scores: list[float] = []

        def score() -> Sequence[float]:
            scores.extend(self._retriever.score(question, chunks))
            return scores

        before = sum(map(len, layout.before))
        plan = make_plan(
            prefix=before,
            chunks=[len(span) for span in spans],
            query=layout.tokens - before,
            answer=answer_tokens,
            window=self._model.window,
            scores=score,
            documents=[c.document_id for c in chunks] if getattr(self._retriever, "comparable", False) else None,
            limit=self._settings.context_tokens,
        )
        if plan.mode != "whole" or self._reorders:
            plan = replace(plan, chunks=self._arrange(layout, plan.chunks, spans))
        if dropped:
            reason = f"{plan.reason}; the oldest {dropped} messages did not fit and were left out"
            plan = replace(plan, reason=reason, dropped=dropped)
        sources = tuple(
            Source(c.document_id, c.index, c.text, deepcopy(c.metadata), scores[i] if scores else None)
            for i, c in ((i, chunks[i]) for i in plan.chunks)
        )
        taken = tuple(spans[i] for i in plan.chunks)
        prompt = Prompt((*layout.before, *taken, *layout.after), layout.query)
        return Request(started, prompt, plan, sources, time.perf_counter())

    def _arrange(self, layout: Layout, chunks: Sequence[int], spans: Sequence[Span]) -> tuple[int, ...]:
        """Documents in an order of which more is exact; the chunks of one stay together and in order."""
        groups: dict[str | None, list[int]] = {}
        for index in chunks:
            groups.setdefault(spans[index].document, []).append(index)
        kept = list(groups.values())
        order = self._arranged(layout.before, [[spans[i] for i in group] for group in kept])
        return tuple(index for number in order for index in kept[number])

    def _trim(
        self, messages: list[Message], context: int, answer: int, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Layout, int]:
        """Leave out the oldest turns until the rest fits beside the answer and a quarter window of context."""
        kept = messages
        while self._model.is_beyond_window(_characters(kept)) and (shorter := without_oldest_turn(kept)):
            kept = shorter
        self._check_size(_characters(kept))
        room = self._model.window - answer - min(context, self._model.window // 4)
        while True:
            self._model.poll()
            layout = self._typesetter.lay_out(kept, tools)
            if layout.tokens <= room or (shorter := without_oldest_turn(kept)) is None:
                return layout, len(messages) - len(kept)
            kept = shorter

    def _check_size(self, characters: int) -> None:
        """Raise PromptTooLongError for what need not be tokenised to see that it does not fit."""
        if self._model.is_beyond_window(characters):
            raise PromptTooLongError(
                f"The prompt has {characters} characters, more than the model's window of {self._model.window} tokens "
                "can have. Shorten it, pass long text as context or add() it."
            )

    def context_chunks(self, context: Iterable[Any]) -> Sequence[Chunk]:
        """The chunks of texts or documents that are not in the corpus, and of sources, which are."""
        chunks: list[Chunk] = []
        corpus: dict[tuple[str, int, str], Chunk] = {}
        for item in check_context(context):
            if not isinstance(item, Source):
                chunks += self._corpus.chunks_of(self._corpus.split(as_document(item)))
                continue
            corpus = corpus or {(c.document_id, c.index, c.text): c for c in self._corpus.chunks()}
            chunk = corpus.get((item.document_id, item.index, item.text))
            if chunk is None:
                raise InputError(
                    f"Chunk {item.index} of document {item.document_id!r} is not in the corpus any more. "
                    "Call retrieve() again, or give the text."
                )
            chunks.append(chunk)
        return chunks


def prefix_of(typesetter: Typesetter, system: str) -> tuple[Span, ...]:
    """What stands before the documents of a question."""
    return typesetter.lay_out(_ask("?", system)).before


def _ask(question: str, system: str) -> list[Message]:
    return [{"role": "system", "content": [system + "\n\n", CONTEXT]}, {"role": "user", "content": question}]


def check_context(context: Iterable[Any]) -> Iterable[Any]:
    """Raises InputError."""
    if isinstance(context, (str, bytes, Document)) or not isinstance(context, Iterable):
        raise InputError(f"context is one {type(context).__name__}. Give a list of texts or documents.")
    return context


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """Raises InputError, EmptyInputError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError('The messages are not a list. Give [{"role": "user", "content": "..."}].')
    checked = list(messages)
    if not checked:
        raise EmptyInputError('There are no messages. Give [{"role": "user", "content": "..."}].')
    for message in checked:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'{message!r} is not a message. Give {{"role": "user", "content": "..."}}.')
        check_text(text_of(message), "A message")
    return checked


def text_of(message: Message) -> str:
    return "".join(piece.text for piece in as_pieces(message.get("content")))


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(text_of(message)) for message in messages)


def without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Without the first message that is not of the system, and all up to the next one of the user; None when only
    the last turn is left."""
    head = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    following = next((i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"), None)
    return None if following is None else [*messages[:head], *messages[following:]]
