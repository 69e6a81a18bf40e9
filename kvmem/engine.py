"""KVMem: documents in, answers out. text -> Prompt -> Plan -> BlendedCache -> repair -> generate -> Answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.answer import Answer, Prefill, Source
from kvmem.any_model import AnyModel
from kvmem.corpus import Corpus
from kvmem.document import Document, Metadata, as_document, named_by_all
from kvmem.errors import InputError
from kvmem.generate import Sampling
from kvmem.library import Library
from kvmem.model import LanguageModel
from kvmem.opening import open_backend, open_model
from kvmem.plan import Plan
from kvmem.prompt import Message, Typesetter
from kvmem.request import Context, Request, RequestBuilder, check_context, check_messages
from kvmem.retrieve import BM25Retriever, Retriever
from kvmem.settings import BlendSettings, Settings
from kvmem.stats import Stats
from kvmem.store.base import Store
from kvmem.store.open import open_store
from kvmem.stream import AnswerStream, Deadline, Listener
from kvmem.thread import Threads, Turn, plain_message, recut
from kvmem.tools import Tool, Toolbox
from kvmem.worker import Worker


class KVMem:
    """A language model that has read your documents.

    model: a hub id, a local directory, a GGUF file, "smollm2", a `LanguageModel`, a transformers model (then with
        `tokenizer`), or the address of a vLLM server, `vllm://host:port/model`.
    tokenizer: of a model object; of a model on a server, also by its directory or hub id.
    store: a directory, a `Store`, or None to keep everything in memory only.
    settings: a `Settings`; any of its fields may also be given by name, and those of `ModelSettings`, `StoreSettings`
        and `RemoteSettings` too.
    retriever: chooses chunks when they do not all fit; BM25 by default.

    May be used from any thread; the model runs in one thread of its own. Close it, or use it in `with`.
    Raises ModelNotFoundError, ModelError, RemoteError, StoreError, InputError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | AnyModel | PreTrainedModel,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        settings: Settings | None = None,
        retriever: Retriever | None = None,
        **overrides: Any,
    ) -> None:
        self.settings = Settings.parse(settings, overrides)
        self.model, self._owns_model = open_model(model, tokenizer, self.settings, overrides)
        self._owns_store = store is None or isinstance(store, (str, os.PathLike))
        self.store = open_store(store, self.settings.storage)
        self.retriever: Retriever = retriever or BM25Retriever()
        namespace = self.settings.namespace
        typesetter = Typesetter(self.model)
        self._corpus = Corpus(self.store, self.model, typesetter, namespace, self.settings.split)
        self._backend = open_backend(self.model, self.store, namespace, typesetter)
        self._requests = RequestBuilder(
            self.model,
            self._corpus,
            typesetter,
            self.retriever,
            self._backend.arrange,
            self.settings,
            reorders=not isinstance(self.model, LanguageModel),
        )
        self._library = Library(
            self.model.window, self.store, self._corpus, self._backend, self._requests, self.settings
        )
        self._threads = Threads(self.store.documents, namespace)
        self._worker = Worker(self.model)

    @property
    def local_model(self) -> LanguageModel:
        """The model, if it runs in this process. Raises InputError."""
        if not isinstance(self.model, LanguageModel):
            raise InputError(f"{self.model.name} runs on a server, and this needs a model in this process.")
        return self.model

    # Documents

    def add(
        self,
        document: Any,
        id: str | None = None,  # noqa: A002
        metadata: Metadata | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Document:
        """Read a document and keep it; one of the same id is replaced, and only what changed is read.

        document: a text, a `pathlib.Path` (text, Markdown, HTML, PDF), a `Document`, or a document of LangChain or
            LlamaIndex.
        cancelled: asked while it is read; once it is true, reading ends by a ClosedError.
        Raises InputError, EmptyInputError, ClosedError; the corpus is unchanged then.
        """
        new = self._library.check(as_document(document, id, metadata))
        return self._worker.read(lambda: self._library.add(new), cancelled)

    def add_all(
        self, documents: Iterable[Any], progress: Callable[[Document, int, int], None] | None = None
    ) -> Sequence[Document]:
        """Add many documents, as `add` takes them. They are looked at before any is added.

        progress: called with each document when it is there, its number from 1, and how many there are. What was added
        before an interruption stays, and costs nothing when all are given again.
        Raises InputError, EmptyInputError, also for two different documents of one id.
        """
        if isinstance(documents, (str, bytes, os.PathLike, Document)) or not isinstance(documents, Iterable):
            raise InputError(f"documents is one {type(documents).__name__}. Give a list, or use add().")
        found: dict[str, Document] = {}
        for item in documents:
            new = self._library.check(as_document(item))
            if found.get(new.id, new) != new:
                new = named_by_all(new)
            if found.setdefault(new.id, new) != new:
                raise InputError(f"Two different documents have the id {new.id!r}. Give each its own.")
        added = []
        for number, new in enumerate(found.values(), 1):
            added.append(self._worker.read(partial(self._library.add, new)))
            if progress is not None:
                progress(added[-1], number, len(found))
        return added

    def update(self, id: str, document: Any, metadata: Metadata | None = None) -> Document:  # noqa: A002
        """Replace a document that is there; only what changed is read. A text keeps the metadata unless some is given.
        Raises UnknownDocumentError, InputError, EmptyInputError."""
        if isinstance(document, str) and metadata is None:
            metadata = self.get(id).metadata
        new = self._library.check(as_document(document, id, metadata))
        return self._worker.read(lambda: self._library.update(new))

    def get(self, id: str) -> Document:  # noqa: A002
        """The document. Raises UnknownDocumentError."""
        self._worker.check_open()
        return self._corpus.get(id)

    def list(self) -> Sequence[Document]:
        """All documents, in the order they were added."""
        self._worker.check_open()
        return tuple(self._corpus)

    def remove(self, id: str) -> None:  # noqa: A002
        """Remove a document and every cache of text that no other document has. Raises UnknownDocumentError."""
        self._worker.run(lambda: self._library.remove(id))

    def clear(self) -> None:
        """Remove every document and every cache of this namespace."""
        self._worker.run(self._library.clear)

    def stats(self) -> Stats:
        """Counts of the corpus and of the store."""
        self._worker.check_open()
        return self._library.stats()

    def read(self, context: Iterable[Any]) -> None:
        """Read texts or documents, as `ask` takes them for context, without adding them to the corpus: a later prompt
        finds them read. Raises InputError, EmptyInputError, PromptTooLongError."""
        documents = [as_document(item) for item in check_context(context)]
        self._worker.read(lambda: self._library.read(documents))

    def forget_text(self, text: Any) -> None:
        """Remove the caches of a text or document that is not of the corpus, as `read` left them."""
        document = as_document(text)
        self._worker.run(lambda: self._library.forget_text(document))

    def forget_user(self, namespace: str | None = None) -> int:
        """Remove every byte of a namespace from the store: documents, memories, conversations and caches; how many
        caches. None is this engine's own. What else is kept stays. Raises StoreError."""
        name = self.settings.namespace if namespace is None else namespace

        def work() -> int:
            self._threads.end_all()
            return self._library.forget_namespace(name)

        return self._worker.run(work)

    # Conversations

    def threads(self) -> Sequence[str]:
        """The names of the conversations that `chat` was told to keep."""
        self._worker.check_open()
        return self._threads.names()

    def history(self, thread: str) -> Sequence[dict[str, Any]]:
        """The messages of a conversation, the last answer included. Raises UnknownThreadError."""
        self._worker.check_open()
        return self._threads.messages(thread)

    def forget_thread(self, thread: str) -> None:
        """Remove a conversation and what is kept of it. Raises UnknownThreadError."""
        self._worker.run(lambda: self._library.forget_spans(self._threads.remove(thread)))

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
        timeout: float | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer a question from the corpus, or from `context` when it is given.

        context: texts or documents, as in `add`, whose caches are stored, and which are not added to the corpus; or
            sources of the corpus, as `retrieve` and `answer.sources` have them.
        system: another system prompt. blend: how stitched caches are repaired, see `BlendSettings`.
        timeout: seconds from the call to the end of the answer. generate_kwargs: handed to transformers' `generate`.
        Raises EmptyInputError, InputError, PromptTooLongError, AnswerTimeoutError.
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
            timeout=timeout,
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
        timeout: float | None = None,
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
            timeout=timeout,
        )

    def batch(
        self,
        questions: Sequence[str],
        *,
        context: Context = None,
        system: str | None = None,
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Sequence[Answer]:
        """Answer several questions; those over the same documents are decoded together, behind one cache.

        What is repaired is chosen for the questions of such a group together. Answers are in the order of the
        questions; sampled ones differ from those that `ask` would give. timeout: seconds for all of them, from when
        they are begun. options: as in `ask`.
        Raises what `ask` raises; bad input before any answer is begun.
        """
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise InputError(f"questions is one {type(questions).__name__}. Give a list of questions.")
        asked, kept = tuple(questions), None if context is None else tuple(check_context(context))
        started = time.perf_counter()
        names = ("max_tokens", "temperature", "top_p", "stop", "seed")
        sampling = self._sampling({name: options.pop(name, None) for name in names}, options)
        settings = self._resolve(self._parse_blend(blend))

        def work() -> Sequence[Answer]:
            deadline = Deadline(timeout, lambda: self._worker.closed)
            with deadline.limiting(self.model):
                with self._worker.turn():
                    requests = [
                        self._requests.for_question(started, question, kept, system, sampling.max_tokens)
                        for question in asked
                    ]
                return self._backend.answer_all(requests, settings, sampling, deadline)

        return self._worker.run(work)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        context: Context = None,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Any,
    ) -> Answer:
        """Continue a conversation: `[{"role": "user", "content": "..."}]`, in the roles of the model's template.

        Long texts in messages are cut and cached, so that what was seen before is not read again, wherever it stands.
        context: texts or documents, as in `ask`, put at the end of the system message; without it, no documents.
        thread: a name under which the conversation is kept, across restarts too: see `history`. Its next turn, or
            another branch of it (a retry, an edited message), then reads nothing that was read or said before.
        tools: functions the model may call, by JSON schema as in OpenAI's API; calls are in `answer.tool_calls`.
        tool_choice: "auto", "none", "any" or a function's name; a forced call follows its schema token by token, and
            so does every answer of a model whose template does not know tools.
        options: as in `ask`, and `schema`, a JSON schema that the answer then keeps to, unless it is a call.
        When the window is full, the oldest turns are left out, and `plan` says so.
        Raises EmptyInputError, InputError, PromptTooLongError.
        """
        stream = self.stream_chat(
            messages, context=context, thread=thread, tools=tools, tool_choice=tool_choice, **options
        )
        return stream.answer

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        context: Context = None,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Like `chat`, as an iterator of text pieces (calls of tools included, as the model writes them); its
        `.answer` is the whole answer."""
        started = time.perf_counter()
        if not tools and tool_choice not in ("auto", "none"):
            raise InputError(f"tool_choice={tool_choice!r} needs tools. Give some.")
        toolbox = Toolbox(tuple(tools), tool_choice, self.model.knows_tools) if tools else None
        given = check_messages(messages)
        conversation = None if thread is None else (thread, [plain_message(message) for message in given])
        if toolbox is not None:
            given = toolbox.instruct(given, options.get("schema"))
            options["schema"] = toolbox.schema_with(options.get("schema"))
        for_template = toolbox.for_template if toolbox is not None else None
        names = ("max_tokens", "temperature", "top_p", "stop", "seed", "schema")
        named = {name: options.pop(name, None) for name in names}
        sampling = self._sampling(named, options)

        def build() -> Request:
            return self._requests.for_messages(started, given, context, sampling.max_tokens, for_template)

        return self._start(build, blend, sampling, toolbox, timeout, conversation)

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Answer:
        """Continue a prompt as it is, without the chat template; special tokens in a text are meant.

        prompt: a text, or token ids. options: as in `ask`. What was read of an earlier prompt is not read again.
        Raises EmptyInputError, InputError, PromptTooLongError.
        """
        return self.stream_complete(prompt, **options).answer

    def stream_complete(
        self,
        prompt: str | Sequence[int],
        *,
        blend: BlendSettings | str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Like `complete`, as an iterator of text pieces; its `.answer` is the whole answer."""
        started = time.perf_counter()
        names = ("max_tokens", "temperature", "top_p", "stop", "seed")
        sampling = self._sampling({name: options.pop(name, None) for name in names}, options)
        return self._start(
            lambda: self._requests.for_raw(started, prompt, sampling.max_tokens), blend, sampling, timeout=timeout
        )

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
        timeout: float | None = None,
        conversation: tuple[str, Sequence[Message]] | None = None,
    ) -> AnswerStream:
        self._worker.check_open()
        known = None if conversation is None else self._threads.branches(conversation[0], self.model.fingerprint)
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise InputError(f"timeout={timeout!r} is no time. Give seconds, more than 0.")
        parsed = self._parse_blend(blend)

        def work(listener: Listener, settings: BlendSettings) -> Answer:
            removals = 0 if conversation is None else self._threads.removals(conversation[0])
            with self._worker.turn(), self.model.giving_up(listener.cancelled):
                request = build()
            if known is not None:
                request = replace(request, prompt=recut(request.prompt, known))
            listener.planned(request.plan, request.sources)
            turn = None
            try:
                answer, turn = self._backend.answer(request, settings, sampling, listener, known is not None)
            finally:
                if conversation is not None and turn is None:
                    # What was read of it is stored all the same, and goes with the conversation.
                    left = Turn(None, request.prompt.said)
                    self._threads.keep(conversation[0], self.model.fingerprint, left, removals)
            if toolbox is not None:
                text, calls = toolbox.read(answer.text)
                answer = replace(answer, text=text, tool_calls=calls)
            if conversation is not None and turn is not None:
                thread, messages = conversation
                self._threads.keep(thread, self.model.fingerprint, turn, removals, [*messages, answer.message])
            return answer

        return self._worker.stream(work, timeout, lambda: self._resolve(parsed))

    def retrieve(self, question: str, k: int) -> tuple[Source, ...]:
        """The `k` most relevant chunks of the corpus, best first, as the retriever scores them; none that it finds
        irrelevant. The model is not run."""
        return self._worker.run(lambda: self._requests.retrieve(question, k))

    def plan(
        self,
        question: str,
        *,
        context: Context = None,
        system: str | None = None,
        max_tokens: int | None = None,
    ) -> Plan:
        """What `ask` would put into the prompt, and why. The model is not run. Arguments and errors as in `ask`."""
        room = self.settings.max_tokens if max_tokens is None else max_tokens
        return self._worker.run(lambda: self._requests.for_question(0.0, question, context, system, room).plan)

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
        settings = self._resolve(self._parse_blend(blend))

        def work() -> Prefill:
            request = self._requests.for_question(started, question, context, system, self.settings.max_tokens)
            return self._backend.prefill(request, settings)

        return self._worker.read(work)

    def _parse_blend(self, blend: BlendSettings | str | Mapping[str, Any] | None) -> BlendSettings:
        if blend is not None and not isinstance(self.model, LanguageModel):
            raise InputError(f"{self.model.name} reuses what prompts begin with, and repairs nothing. Leave blend out.")
        return self.settings.blend if blend is None else BlendSettings.parse(blend)

    def _resolve(self, parsed: BlendSettings) -> BlendSettings:
        """With a number for "auto", which a check of the model may have to find first."""
        if parsed.recompute != "auto" or not isinstance(self.model, LanguageModel):
            return parsed
        from kvmem.check import check, recall  # the check is written with KVMem

        report = recall(self.model) or check(self.model)
        return parsed.model_copy(update={"recompute": report.recompute if report.recompute is not None else 0.0})

    # Lifetime

    def close(self) -> None:
        """Cancel running answers and release the buffer, and the store unless it was handed in as an object.

        Calling it again does nothing.
        """
        if self._worker.closed:
            return
        self._worker.close()
        self._backend.close()
        if self._owns_store:
            self.store.close()
        if self._owns_model:
            self.model.close()

    def __enter__(self) -> KVMem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
