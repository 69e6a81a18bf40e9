"""Validate messages and turn them into a planned prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol

from kvmem.cancellation import NEVER, Cancellation
from kvmem.errors import EmptyInputError, InputError
from kvmem.library.corpus import Chunker
from kvmem.library.scope import Scope, nothing_in, select
from kvmem.library.selection import Selection
from kvmem.library.trimming import Trimmer, check_size
from kvmem.model.base import AnyModel
from kvmem.prompt.layout import (
    CONTEXT,
    DEFAULT_SYSTEM,
    PLAIN,
    Layout,
    Message,
    Piece,
    Prompt,
    TemplateOptions,
    Typesetter,
    as_pieces,
)
from kvmem.prompt.messages import check_messages, check_question, check_raw, text_of
from kvmem.prompt.plan import Plan, make_plan
from kvmem.prompt.span import Span
from kvmem.results import Source
from kvmem.settings import Settings
from kvmem.text.document import Chunk
from kvmem.text.retrieval import BM25Retriever, Retriever


@dataclass(frozen=True, eq=False)
class Request:
    """A validated question with its planned prompt.

    started, prepared: `time.perf_counter()` seconds. in_place: ids of documents to read where they stand if everything
        before them is exact, even if there are entries of other contexts; None stands for what is not a document.
    lasting: whether the same documents will be asked about again, in this order.
    """

    started: float
    prompt: Prompt
    plan: Plan
    sources: tuple[Source, ...]
    prepared: float
    conversation: bool = False
    in_place: frozenset[str | None] = frozenset()
    lasting: bool = False


class Arranger(Protocol):
    """Orders documents so that more of the prompt is exact; see `Backend`."""

    @property
    def reorders(self) -> bool: ...

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> Sequence[int]: ...


class RequestBuilder:
    """Builds requests."""

    def __init__(
        self,
        model: AnyModel,
        chunker: Chunker,
        typesetter: Typesetter,
        retriever: Retriever,
        arranger: Arranger,
        settings: Settings,
    ) -> None:
        self._model, self._chunker, self._retriever, self._settings = model, chunker, retriever, settings
        self._typesetter, self._arranger = typesetter, arranger
        self._trimmer = Trimmer(model, typesetter)
        # Ranks sources where no retriever was asked.
        self._words = BM25Retriever()

    def prefix(self, system: str | None) -> tuple[Span, ...]:
        """The spans before the documents; `system=None` uses the system prompt of the settings."""
        return self._before(self._question("?", system))

    def before(self, messages: Sequence[Message] | None) -> tuple[Span, ...]:
        """What precedes the documents in these messages, which mark their place by CONTEXT; None is a question."""
        return self._before(self._question("?", None) if messages is None else messages)

    def _before(self, messages: Sequence[Message]) -> tuple[Span, ...]:
        return self._typesetter.lay_out(messages, self._with_defaults(PLAIN)).before

    def _with_defaults(self, options: TemplateOptions) -> TemplateOptions:
        """With the settings' arguments of the chat template, which those of the call override."""
        extra = {**self._settings.chat_template_kwargs, **options.extra}
        return replace(options, extra=extra)

    def for_question(
        self,
        started: float,
        question: str,
        scope: Scope,
        system: str | None,
        answer_tokens: int,
        options: TemplateOptions = PLAIN,
        cancellation: Cancellation = NEVER,
    ) -> Request:
        """A request to answer a question from the scope."""
        check_question(question)
        selection = select(scope, self._chunker, cancellation)
        if not selection.chunks:
            raise EmptyInputError(nothing_in(scope))
        messages = self._question(question, system)
        return self._build(
            started, messages, question, selection, answer_tokens, options, scope.retriever, cancellation
        )

    def retrieve(self, question: str, k: int, scope: Scope) -> tuple[Source, ...]:
        """The `k` best chunks in the scope, best first."""
        check_question(question)
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}.")
        chunks = select(scope, self._chunker, NEVER).chunks
        scores = _scores(scope.retriever or self._retriever, question, chunks)
        best = sorted(range(len(chunks)), key=lambda i: (-scores[i], i))[:k]
        found = ((chunks[i], scores[i]) for i in best if scores[i] > 0)
        return tuple(_source(chunk, score) for chunk, score in found)

    def for_messages(
        self,
        started: float,
        messages: Sequence[Message],
        scope: Scope | None,
        answer_tokens: int,
        options: TemplateOptions = PLAIN,
        cancellation: Cancellation = NEVER,
        search: str | None = None,
    ) -> Request:
        """A request to continue a conversation; the chunks in the scope are added to the end of its system message.

        A conversation without a system message gets the system prompt of the settings, if there is one.
        """
        checked = check_messages(messages)
        asked = search or next((text for m in reversed(checked) if (text := text_of(m))), "")
        if not asked:
            raise EmptyInputError("The messages have no text. Give at least one message with text.")
        selection = Selection([], []) if scope is None else select(scope, self._chunker, cancellation)
        if selection.chunks:
            checked = self._with_context(checked)
        elif self._settings.system is not None and checked[0]["role"] != "system":
            checked = [{"role": "system", "content": self._settings.system}, *checked]
        retriever = None if scope is None else scope.retriever
        return self._build(
            started, checked, asked, selection, answer_tokens, options, retriever, cancellation, conversation=True
        )

    def for_raw(self, started: float, prompt: str | Sequence[int], answer_tokens: int) -> Request:
        """A request to continue a raw prompt."""
        check_raw(prompt, self._model.vocabulary)
        check_size(self._model, len(prompt) if isinstance(prompt, str) else 0)
        layout = self._typesetter.lay_out_raw(prompt)
        plan = make_plan(
            prefix=0, chunks=(), query=layout.tokens, answer=answer_tokens, window=self._model.window, scores=tuple
        )
        return Request(started, Prompt(layout.after, layout.query), plan, (), time.perf_counter())

    def _question(self, question: str, system: str | None) -> list[Message]:
        return _ask(question, self._system(system))

    def _system(self, system: str | None) -> str:
        return next(s for s in (system, self._settings.system, DEFAULT_SYSTEM) if s is not None)

    def _with_context(self, messages: list[Message]) -> list[Message]:
        if any(piece is CONTEXT for message in messages for piece in as_pieces(message.get("content"))):
            return messages
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": [self._system(None) + "\n\n", CONTEXT]}, *messages]
        # Joined with the text before it, as in `_question`, because a token may cross the boundary.
        *pieces, last = as_pieces(messages[0]["content"]) or [Piece("")]
        ending = [Piece(last.text + "\n\n")] if last.document is None else [last, Piece("\n\n")]
        content = [*pieces, *ending, CONTEXT]
        return [{**messages[0], "content": content}, *messages[1:]]

    def _build(
        self,
        started: float,
        messages: list[Message],
        question: str,
        selection: Selection,
        answer_tokens: int,
        options: TemplateOptions,
        retriever: Retriever | None,
        cancellation: Cancellation,
        conversation: bool = False,
    ) -> Request:
        chunks, sizes = selection.chunks, selection.sizes
        options = self._with_defaults(options)
        layout, dropped = self._trimmer.lay_out(messages, sum(sizes), answer_tokens, options, cancellation)
        ranking = retriever or self._retriever
        scores: list[float] = []

        def score() -> Sequence[float]:
            scores.extend(_scores(ranking, question, chunks))
            return scores

        before = sum(map(len, layout.before))
        plan = make_plan(
            prefix=before,
            chunks=sizes,
            query=layout.tokens - before,
            answer=answer_tokens,
            window=self._model.window,
            scores=score,
            documents=selection.documents if getattr(ranking, "comparable", False) else None,
            limit=self._settings.context_tokens,
        )
        spans = dict(zip(plan.chunks, self._chunker.spans([chunks[i] for i in plan.chunks]), strict=True))
        if plan.mode != "whole" or self._arranger.reorders:
            plan = replace(plan, chunks=self._arrange(layout, plan.chunks, spans))
        if dropped:
            reason = f"{plan.reason}; the oldest {dropped} messages were left out because they did not fit"
            plan = replace(plan, reason=reason, dropped=dropped)
        relevance = scores or self._words.score(question, chunks)
        sources = tuple(_source(chunks[i], relevance[i]) for i in plan.chunks)
        prompt = Prompt((*layout.before, *(spans[i] for i in plan.chunks), *layout.after), layout.query, layout.opening)
        # What is left of a conversation is read once as it stands now, and is exact from then on.
        in_place = frozenset({None}) if dropped else frozenset()
        lasting = selection.complete and plan.mode == "whole"
        return Request(started, prompt, plan, sources, time.perf_counter(), conversation, in_place, lasting)

    def _arrange(self, layout: Layout, chunks: Sequence[int], spans: Mapping[int, Span]) -> tuple[int, ...]:
        """Order the documents so that more of the prompt is exact; chunks of a document stay together and in order."""
        groups: dict[str | None, list[int]] = {}
        for index in chunks:
            groups.setdefault(spans[index].document, []).append(index)
        kept = list(groups.values())
        order = self._arranger.arrange(layout.before, [[spans[i] for i in group] for group in kept])
        return tuple(index for number in order for index in kept[number])


def _scores(retriever: Retriever, question: str, chunks: Sequence[Chunk]) -> Sequence[float]:
    scores = retriever.score(question, chunks)
    if len(scores) != len(chunks):
        raise InputError(
            f"{type(retriever).__name__}.score() returned {len(scores)} scores for {len(chunks)} chunks. "
            "Return one score per chunk, in the given order."
        )
    return scores


def _source(chunk: Chunk, score: float | None) -> Source:
    return Source(chunk.document_id, chunk.index, chunk.text, deepcopy(chunk.metadata), score)


def prefix_of(typesetter: Typesetter, system: str) -> tuple[Span, ...]:
    """The spans before the documents of a question."""
    return typesetter.lay_out(_ask("?", system)).before


def _ask(question: str, system: str) -> list[Message]:
    return [{"role": "system", "content": [system + "\n\n", CONTEXT]}, {"role": "user", "content": question}]
