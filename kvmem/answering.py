"""Answering: builds requests, runs them on the backend, and keeps conversations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from kvmem.backends.base import Backend
from kvmem.cancellation import Cancellation
from kvmem.errors import InputError
from kvmem.ingest import Ingestion
from kvmem.library.request import Request, RequestBuilder
from kvmem.library.scope import Scope
from kvmem.library.threads import Begun, Threads, Turn, check_name, plain_message, recut
from kvmem.model.base import AnyModel
from kvmem.options import Blend, GenerateOptions, Sampling, as_sampling
from kvmem.parsing import AnswerReader
from kvmem.prompt.layout import Message, TemplateOptions
from kvmem.prompt.messages import check_messages
from kvmem.prompt.plan import Plan
from kvmem.prompt.tools import Tool, Toolbox
from kvmem.results import Answer, Prefill, Source
from kvmem.runtime.channel import PartListener
from kvmem.runtime.stream import AnswerStream
from kvmem.runtime.worker import Worker
from kvmem.settings import BlendSettings

Build = Callable[[Cancellation], Request]


@dataclass(frozen=True)
class _Conversation:
    """A thread to keep, and its messages up to the answer."""

    thread: str
    messages: Sequence[Message]


class _Reading:
    """A listener of a backend that passes the parts of the answer on."""

    def __init__(self, reader: AnswerReader, listener: PartListener) -> None:
        self._reader, self._listener = reader, listener

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        self._listener.planned(plan, sources)

    def text(self, piece: str) -> None:
        for part in self._reader.feed(piece):
            self._listener.part(part)

    def finish(self, answer: Answer) -> Answer:
        """The answer, taken apart."""
        for part in self._reader.end():
            self._listener.part(part)
        return _taken_apart(answer, self._reader)


def _read(answer: Answer, reader: AnswerReader) -> Answer:
    reader.feed(answer.text)
    return _taken_apart(answer, reader)


def _taken_apart(answer: Answer, reader: AnswerReader) -> Answer:
    return replace(answer, **vars(reader.finish()))


class Answering:
    """Answers questions, conversations and raw prompts. May be used from any thread."""

    def __init__(
        self,
        model: AnyModel,
        backend: Backend,
        requests: RequestBuilder,
        ingestion: Ingestion,
        threads: Threads,
        worker: Worker,
        max_tokens: int,
    ) -> None:
        self._model, self._backend, self._requests = model, backend, requests
        self._ingestion, self._threads, self._worker = ingestion, threads, worker
        self._max_tokens = max_tokens

    def ask(
        self, question: str, scope: Scope, system: str | None, template: TemplateOptions, options: GenerateOptions
    ) -> AnswerStream:
        """Answer a question from the scope."""
        started = time.perf_counter()
        sampling = as_sampling(options, self._max_tokens)

        def build(cancellation: Cancellation) -> Request:
            room = sampling.max_tokens
            return self._requests.for_question(started, question, scope, system, room, template, cancellation)

        return self._start(build, sampling, options, AnswerReader)

    def chat(
        self,
        messages: Sequence[Message],
        scope: Scope | None,
        thread: str | None,
        tools: Sequence[Tool] | None,
        tool_choice: str,
        template: TemplateOptions,
        options: GenerateOptions,
    ) -> AnswerStream:
        """Continue a conversation; without a scope, no documents are in the prompt."""
        started = time.perf_counter()
        if not tools and tool_choice not in ("auto", "none"):
            raise InputError(f"tool_choice={tool_choice!r} needs tools. Give some.")
        toolbox = Toolbox(tuple(tools), tool_choice, self._model.knows_tools) if tools else None
        given = check_messages(messages)
        kept = None
        if thread is not None:
            kept = _Conversation(check_name(thread), [plain_message(message) for message in given])
        if toolbox is not None:
            given = toolbox.instruct(given, options.get("schema"))
            options["schema"] = toolbox.schema_with(options.get("schema"))
            template = replace(template, tools=toolbox.for_template)
        sampling = as_sampling(options, self._max_tokens)

        def build(cancellation: Cancellation) -> Request:
            room = sampling.max_tokens
            return self._requests.for_messages(started, given, scope, room, template, cancellation)

        return self._start(build, sampling, options, AnswerReader if toolbox is None else toolbox.reader, kept)

    def complete(self, prompt: str | Sequence[int], options: GenerateOptions) -> AnswerStream:
        """Continue a raw prompt."""
        started = time.perf_counter()
        sampling = as_sampling(options, self._max_tokens)
        return self._start(lambda _: self._requests.for_raw(started, prompt, sampling.max_tokens), sampling, options)

    def run(self, request: Request, options: GenerateOptions) -> AnswerStream:
        """Answer a request that was built before."""
        return self._start(lambda _: request, as_sampling(options, self._max_tokens), options, AnswerReader)

    def batch(
        self,
        questions: Sequence[str | Sequence[Message]],
        scope: Scope,
        named: bool,
        system: str | None,
        template: TemplateOptions,
        options: GenerateOptions,
    ) -> Sequence[Answer]:
        """Answer several questions or conversations together.

        named: whether the caller named the scope; if not, conversations have no documents.
        """
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise InputError(f"questions is a {type(questions).__name__}. Give a list of questions.")
        asked = tuple(questions)
        started = time.perf_counter()
        sampling = replace(as_sampling(options, self._max_tokens), marks=True)
        settings = self._backend.resolve(self._backend.parse_blend(options.get("blend")))
        given = scope if named else None

        def build(asked: str | Sequence[Message], stop: Cancellation) -> Request:
            room = sampling.max_tokens
            if isinstance(asked, str):
                return self._requests.for_question(started, asked, scope, system, room, template, stop)
            return self._requests.for_messages(started, asked, given, room, template, stop)

        def work() -> Sequence[Answer]:
            cancellation = Cancellation(options.get("timeout"), self._worker.closing)
            with self._worker.turn():
                requests = [build(question, cancellation) for question in asked]
            answers = self._backend.answer_all(requests, settings, sampling, cancellation)
            readers = [AnswerReader(opening=request.prompt.opening) for request in requests]
            return [_read(answer, reader) for answer, reader in zip(answers, readers, strict=True)]

        return self._worker.run(work)

    def prefill(
        self, question: str, scope: Scope, system: str | None, template: TemplateOptions, blend: Blend
    ) -> Prefill:
        """The composed and blended state for a question."""
        started = time.perf_counter()
        settings = self._backend.resolve(self._backend.parse_blend(blend))

        def work() -> Prefill:
            stop = self._worker.closing
            request = self._requests.for_question(started, question, scope, system, self._max_tokens, template, stop)
            return self._backend.prefill(request, settings, stop)

        return self._worker.run(work)

    def _start(
        self,
        build: Build,
        sampling: Sampling,
        options: GenerateOptions,
        reads: Callable[..., AnswerReader] | None = None,
        conversation: _Conversation | None = None,
    ) -> AnswerStream:
        """reads: makes a reader of the answer, by the prompt's `opening`; None leaves the answer as it is."""
        self._worker.check_open()
        parsed = self._backend.parse_blend(options.get("blend"))

        def work(listener: PartListener, cancellation: Cancellation, settings: BlendSettings) -> Answer:
            with self._worker.turn():
                request = build(cancellation)
            opening = request.prompt.opening
            reading = None if reads is None else _Reading(reads(opening=opening), listener)
            drawn = replace(sampling, marks=reading is not None, opening=opening)
            begun = None
            if conversation is not None:
                begun = self._threads.begin(conversation.thread, self._model.fingerprint)
                request = replace(request, prompt=recut(request.prompt, begun.branches))
            listener.planned(request.plan, request.sources)
            turn = None
            try:
                answer, turn = self._backend.answer(
                    request, settings, drawn, reading or listener, cancellation, begun is not None
                )
            finally:
                if begun is not None and turn is None:
                    # What was read of it is stored all the same, and is removed with the conversation.
                    self._keep(begun, Turn(None, request.prompt.said))
            if answer.finish_reason == "cancelled" and not cancellation.cancelled:
                cancellation.check()
            if reading is not None:
                answer = reading.finish(answer)
            if begun is not None and conversation is not None and turn is not None:
                self._keep(begun, turn, [*conversation.messages, answer.message])
            return answer

        return self._worker.stream(work, options.get("timeout"), lambda: self._backend.resolve(parsed))

    def _keep(self, begun: Begun, turn: Turn, messages: Sequence[Message] | None = None) -> None:
        """Write down a turn; if its conversation was removed meanwhile, its caches go, too."""
        if not self._threads.keep(begun, self._model.fingerprint, turn, messages):
            self._ingestion.forget_spans({self._model.fingerprint: turn.spans})
