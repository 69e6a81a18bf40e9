"""From a question to a checked and planned prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmem.answer import Source
from kvmem.corpus import Corpus, chunks_of
from kvmem.document import Chunk, Document, as_document, check_text, split
from kvmem.errors import EmptyInputError, InputError
from kvmem.model import LanguageModel
from kvmem.plan import Plan, make_plan
from kvmem.prompt import DEFAULT_SYSTEM, Frame, Prompt, make_frame, query_ids
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
    """Builds requests over one corpus."""

    def __init__(self, model: LanguageModel, corpus: Corpus, retriever: Retriever, settings: Settings) -> None:
        self._model, self._corpus, self._retriever, self._settings = model, corpus, retriever, settings
        self._frames: dict[str, Frame] = {}

    def frame(self, system: str | None) -> Frame:
        """The template for a system prompt; None is the one of the settings."""
        text = next(s for s in (system, self._settings.system, DEFAULT_SYSTEM) if s is not None)
        if text not in self._frames:
            self._frames[text] = make_frame(self._model, text)
        return self._frames[text]

    def build(
        self,
        started: float,
        question: str,
        context: Context,
        system: str | None,
        answer_tokens: int,
    ) -> Request:
        if not isinstance(question, str):
            raise InputError(f"The question is a {type(question).__name__}. Give a str.")
        check_text(question, "The question")
        if not question.strip():
            raise EmptyInputError("The question is empty. Ask something.")
        frame = self.frame(system)
        chunks = self._corpus.chunks() if context is None else self._context_chunks(context)
        if not chunks:
            raise EmptyInputError(
                "There is nothing to answer from: the corpus is empty. add() a document first, "
                "or pass texts as context=[...]."
            )
        spans = [self._corpus.span(chunk) for chunk in chunks]
        query = query_ids(self._model, frame, question)
        scores: list[float] = []

        def score() -> Sequence[float]:
            scores.extend(self._retriever.score(question, chunks))
            return scores

        plan = make_plan(
            prefix=len(frame.prefix),
            chunks=[len(span) for span in spans],
            query=len(query),
            answer=answer_tokens,
            window=self._model.window,
            scores=score,
        )
        sources = tuple(
            Source(c.document_id, c.index, c.text, c.metadata, scores[i] if scores else None)
            for i, c in ((i, chunks[i]) for i in plan.chunks)
        )
        taken = tuple(spans[i] for i in plan.chunks)
        return Request(started, Prompt(frame.prefix, taken, query), plan, sources, time.perf_counter())

    def _context_chunks(self, context: Iterable[Any]) -> Sequence[Chunk]:
        if isinstance(context, (str, bytes)):
            raise InputError("context is one text. Give a list of texts or documents.")
        chunks: list[Chunk] = []
        for item in context:
            document = as_document(item)
            pieces = document.chunks or split(document.text, self._model.count_tokens, self._settings.split)
            chunks += chunks_of(Document(document.id, document.text, document.metadata, pieces))
        return chunks
