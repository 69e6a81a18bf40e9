"""KVMem: documents in, answers out. text -> Prompt -> Plan -> BlendedCache -> repair -> generate -> Answer."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.answer import Answer, Prefill, Source
from kvmem.compose import Composer
from kvmem.corpus import Corpus, chunks_of
from kvmem.document import Document, Metadata, as_document
from kvmem.errors import ClosedError, InputError, PromptTooLongError
from kvmem.generate import Sampling
from kvmem.model import LanguageModel
from kvmem.prompt import DEFAULT_SYSTEM, Message, Span, Typesetter
from kvmem.request import Context, Request, RequestBuilder, check_messages
from kvmem.retrieve import BM25Retriever, Retriever
from kvmem.runner import Runner
from kvmem.settings import BlendSettings, ModelSettings, Settings
from kvmem.stats import DocumentStats, Stats
from kvmem.store.base import Store
from kvmem.store.open import open_store
from kvmem.stream import AnswerStream, Listener
from kvmem.tools import Tool, Toolbox

T = TypeVar("T")
logger = logging.getLogger("kvmem")
Spans = list[Span]  # inside KVMem, `list` is its method


class KVMem:
    """A language model that has read your documents.

    model: a hub id, a local directory, a GGUF file, "smollm2", a `LanguageModel`, or a transformers model
        (then with `tokenizer`).
    store: a directory, a `Store`, or None to keep everything in memory only.
    settings: a `Settings`; any of its fields may also be given by name, and those of `ModelSettings` too.
    retriever: chooses chunks when they do not all fit; BM25 by default.

    May be used from any thread; the model runs in one thread of its own. Close it, or use it in `with`.
    Raises ModelNotFoundError, ModelError, StoreError, InputError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel | PreTrainedModel,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: Settings | None = None,
        retriever: Retriever | None = None,
        **overrides: Any,
    ) -> None:
        self.settings = Settings.parse(settings, overrides)
        self.model = self._open_model(model, tokenizer, overrides)
        self._owns_store = store is None or isinstance(store, (str, os.PathLike))
        self.store = open_store(store, self.settings.storage)
        self.retriever: Retriever = retriever or BM25Retriever()
        namespace = self.settings.namespace
        # Both are looked up by the first question otherwise, which would wait for them.
        _ = self.model.fingerprint, self.model.anatomy
        if not self.model.blendable:
            reason = self.model.anatomy.reason
            logger.warning("kvmem: %s reuses exact prefixes only, since %s", self.model.name, reason)
        typesetter = Typesetter(self.model)
        self._corpus = Corpus(self.store, self.model, typesetter, namespace, self.settings.split)
        self._requests = RequestBuilder(self.model, self._corpus, typesetter, self.retriever, self.settings)
        neutral = self._requests.prefix(DEFAULT_SYSTEM)
        preamble = Span(tuple(token for span in neutral for token in span.token_ids))
        self._composer = Composer(self.model, self.store, namespace, preamble)
        self._runner = Runner(self.model, self.store, self._composer)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvmem")
        self._streams: WeakSet[AnswerStream] = WeakSet()
        self._closed = False

    def _open_model(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, overrides: Mapping[str, Any]
    ) -> LanguageModel:
        if isinstance(model, LanguageModel):
            if ignored := overrides.keys() & ModelSettings.model_fields.keys():
                raise InputError(f"{min(ignored)} belongs to loading, and this model is loaded. Give it to load().")
            return model
        if isinstance(model, (str, os.PathLike)):
            return LanguageModel.load(model, self.settings.model)
        if tokenizer is None:
            raise InputError("A model object needs its tokenizer: KVMem(model, store, tokenizer=tokenizer).")
        return LanguageModel(model, tokenizer, settings=self.settings.model)

    # Documents

    def add(self, document: Any, id: str | None = None, metadata: Metadata | None = None) -> Document:  # noqa: A002
        """Read a document and keep it; one of the same id is replaced, and only what changed is read.

        document: a text, a `pathlib.Path`, a `Document`, or a document of LangChain or LlamaIndex.
        Raises InputError, EmptyInputError; the corpus is unchanged then.
        """
        new = as_document(document, id, metadata)
        return self._run(lambda: self._add(new))

    def _add(self, new: Document) -> Document:
        old = self._corpus.find(new.id)
        added = self._corpus.put(new)
        try:
            self._read(added, anew=old is None)
        except BaseException:
            if old is None:
                self._corpus.remove(added.id)
            else:
                self._corpus.put(old)
            raise
        if old is not None:
            self._forget(old)
        return added

    def get(self, id: str) -> Document:  # noqa: A002
        """The document. Raises UnknownDocumentError."""
        self._check_open()
        return self._corpus.get(id)

    def list(self) -> Sequence[Document]:
        """All documents, in the order they were added."""
        self._check_open()
        return tuple(self._corpus)

    def remove(self, id: str) -> None:  # noqa: A002
        """Remove a document and every cache of text that no other document has. Raises UnknownDocumentError."""
        self._run(lambda: self._forget(self._corpus.remove(id)))

    def clear(self) -> None:
        """Remove every document and every cache of this namespace."""
        self._run(self._clear)

    def _clear(self) -> None:
        for document in tuple(self._corpus):
            self._corpus.remove(document.id)
        self._runner.release()
        self.store.clear(self.settings.namespace)

    def stats(self) -> Stats:
        """Counts of the corpus and of the store."""
        self._check_open()
        rows = tuple(self._document_stats(document) for document in self._corpus)
        chunks, tokens = sum(row.chunks for row in rows), sum(row.tokens for row in rows)
        return Stats(len(rows), chunks, tokens, self.store.stats(self.settings.namespace), rows)

    def _document_stats(self, document: Document) -> DocumentStats:
        spans = [self._corpus.span(chunk) for chunk in chunks_of(document)]
        infos = [info for span in {span.digest: span for span in spans}.values() for info in self._composer.known(span)]
        size = sum(info.nbytes for info in infos)
        return DocumentStats(document.id, len(spans), sum(map(len, spans)), len(infos), size)

    def _read(self, document: Document, anew: bool) -> None:
        """Bring the document's chunks into the store: in place behind the corpus while that fits the window."""
        prefix = self._requests.prefix(None)
        corpus = [self._corpus.span(chunk) for chunk in self._corpus.chunks()]
        before = sum(map(len, prefix))
        if before + sum(map(len, corpus)) + self.settings.max_tokens <= self.model.window:
            self._runner.read([*prefix, *corpus], in_place=document.id if anew else None)
            return
        run: Spans = []
        for span in (self._corpus.span(chunk) for chunk in chunks_of(document)):
            if before + len(span) > self.model.window:
                raise PromptTooLongError(
                    f"A chunk of {len(span)} tokens does not fit the model's window of {self.model.window}. "
                    "Give smaller chunks, or let kvmem split the text."
                )
            if run and before + sum(map(len, run)) + len(span) > self.model.window:
                self._runner.read([*prefix, *run])
                run = []
            run.append(span)
        self._runner.read([*prefix, *run])

    def _forget(self, document: Document) -> None:
        used = self._corpus.in_use()
        for chunk in chunks_of(document):
            span = self._corpus.span(chunk)
            if span.digest not in used:
                self._composer.forget(span)

    # Questions

    def ask(
        self,
        question: str,
        *,
        context: Context = None,
        system: str | None = None,
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer a question from the corpus, or from `context` when it is given.

        context: texts or documents, as in `add`; their caches are stored, they are not added to the corpus.
        system: another system prompt. blend: how stitched caches are repaired, see `BlendSettings`.
        generate_kwargs: handed to transformers' `generate`.
        Raises EmptyInputError, InputError, PromptTooLongError.
        """
        stream = self.stream(
            question,
            context=context,
            system=system,
            blend=blend,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            seed=seed,
            **generate_kwargs,
        )
        return stream.answer

    def stream(
        self,
        question: str,
        *,
        context: Context = None,
        system: str | None = None,
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> AnswerStream:
        """Like `ask`, as an iterator of text pieces; its `.answer` is the whole answer."""
        started = time.perf_counter()
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop, "seed": seed}
        sampling = self._sampling(options, generate_kwargs)
        return self._start(
            lambda: self._requests.for_question(started, question, context, system, sampling.max_tokens),
            blend,
            sampling,
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        context: Context = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Any,
    ) -> Answer:
        """Continue a conversation: `[{"role": "user", "content": "..."}]`, in the roles of the model's template.

        Long texts in messages are cut and cached, so that what was seen before is not read again, wherever it stands.
        context: texts or documents, as in `ask`, put at the end of the system message; without it, no documents.
        tools: functions the model may call, by JSON schema as in OpenAI's API; calls are in `answer.tool_calls`.
        tool_choice: "auto", "none", "any" or a function's name; a forced call follows its schema token by token, and
            so does every answer of a model whose template does not know tools.
        options: as in `ask`, and `schema`, a JSON schema that the answer then keeps to.
        When the window is full, the oldest turns are left out, and `plan` says so.
        Raises EmptyInputError, InputError, PromptTooLongError.
        """
        return self.stream_chat(messages, context=context, tools=tools, tool_choice=tool_choice, **options).answer

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        context: Context = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Like `chat`, as an iterator of text pieces (calls of tools included, as the model writes them); its
        `.answer` is the whole answer."""
        started = time.perf_counter()
        if not tools and tool_choice not in ("auto", "none"):
            raise InputError(f"tool_choice={tool_choice!r} needs tools. Give some.")
        toolbox = Toolbox(tuple(tools), tool_choice, self.model.knows_tools) if tools else None
        if toolbox is not None:
            messages = toolbox.instruct(check_messages(messages))
            if options.get("schema") is None:
                options["schema"] = toolbox.schema
        for_template = toolbox.for_template if toolbox is not None else None
        names = ("max_tokens", "temperature", "top_p", "stop", "seed", "schema")
        named = {name: options.pop(name, None) for name in names}
        sampling = self._sampling(named, options)

        def build() -> Request:
            return self._requests.for_messages(started, messages, context, sampling.max_tokens, for_template)

        return self._start(build, blend, sampling, toolbox)

    def _sampling(self, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Sampling:
        stop, max_tokens = options["stop"], options["max_tokens"]
        return Sampling(
            max_tokens=self.settings.max_tokens if max_tokens is None else max_tokens,
            temperature=options["temperature"] or 0.0,
            top_p=options["top_p"],
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            seed=options["seed"],
            schema=options.get("schema"),
            extra=extra,
        )

    def _start(
        self,
        build: Callable[[], Request],
        blend: BlendSettings | str | Mapping[str, Any] | None,
        sampling: Sampling,
        toolbox: Toolbox | None = None,
    ) -> AnswerStream:
        self._check_open()
        settings = self._blend(blend)

        def work(listener: Listener) -> Answer:
            with self._work():
                request = build()
                listener.planned(request.plan, request.sources)
                answer = self._runner.answer(request, settings, sampling, listener)
            if toolbox is None:
                return answer
            text, calls = toolbox.read(answer.text)
            return replace(answer, text=text, tool_calls=calls)

        stream = AnswerStream(self._executor, work)
        self._streams.add(stream)
        return stream

    def retrieve(self, question: str, k: int) -> tuple[Source, ...]:
        """The `k` most relevant chunks of the corpus, best first, as the retriever scores them; none that it finds
        irrelevant. The model is not run."""
        return self._run(lambda: self._requests.retrieve(question, k))

    def prefill(
        self,
        question: str,
        *,
        context: Context = None,
        system: str | None = None,
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
    ) -> Prefill:
        """The stitched and repaired state for a question, without generating; compare it with `model(token_ids)`.

        Arguments and errors as in `ask`.
        """
        started = time.perf_counter()
        settings = self._blend(blend)

        def work() -> Prefill:
            request = self._requests.for_question(started, question, context, system, self.settings.max_tokens)
            return self._runner.prefill(request, settings)

        return self._run(work)

    def _blend(self, blend: BlendSettings | str | Mapping[str, Any] | None) -> BlendSettings:
        parsed = self.settings.blend if blend is None else BlendSettings.parse(blend)
        if parsed.recompute != "auto":
            return parsed
        from kvmem.check import check, recall  # the check is written with KVMem

        report = recall(self.model) or check(self.model)
        return parsed.model_copy(update={"recompute": report.recompute if report.recompute is not None else 0.0})

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Around everything that runs in the engine's thread."""
        with self.model.lock:
            self.model.working = threading.get_ident()
            try:
                yield
            finally:
                self.model.working = 0

    # Lifetime

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("This KVMem was closed. Open a new one on the same store.")
        if threading.get_ident() == self.model.working:
            raise InputError(
                "A KVMem was called from inside its own work, or that of another with the same model (by a retriever, "
                "or while iterating context). Use one with a model of its own there, or do it before the call."
            )

    def _run(self, work: Callable[[], T]) -> T:
        self._check_open()

        def locked() -> T:
            with self._work():
                return work()

        return self._executor.submit(locked).result()

    def close(self) -> None:
        """Cancel running answers and release the buffer, and the store unless it was handed in as an object.

        Calling it again does nothing.
        """
        if self._closed:
            return
        self._closed = True
        for stream in tuple(self._streams):
            stream.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._runner.release()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> KVMem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
