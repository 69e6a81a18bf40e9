"""KVMem: documents in, answers out. text -> Prompt -> Plan -> BlendedCache -> blend -> generate -> Answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.backends.open import open_backend, open_model
from kvmem.cancellation import Cancellation
from kvmem.collection import Collection
from kvmem.errors import InputError
from kvmem.ingest import Library, Progress
from kvmem.library.corpus import Chunker, Corpora, DocumentFilter
from kvmem.library.request import ContextTexts, Request, RequestBuilder, Scope, check_context, check_messages
from kvmem.library.stats import Stats
from kvmem.library.threads import Begun, Threads, Turn, check_name, plain_message, recut
from kvmem.model.base import AnyModel
from kvmem.model.local import LanguageModel
from kvmem.options import Blend, GenerateOptions, Sampling, as_sampling
from kvmem.prompt.layout import Message, Typesetter
from kvmem.prompt.plan import Plan
from kvmem.prompt.tools import Tool, Toolbox
from kvmem.results import Answer, Prefill, Source
from kvmem.runtime.stream import AnswerStream, Listener
from kvmem.runtime.worker import Worker
from kvmem.settings import BlendSettings, EngineOptions, Settings
from kvmem.store.base import Store
from kvmem.store.open import open_store
from kvmem.text.document import Chunk, Document, Metadata, as_document
from kvmem.text.retrieval import BM25Retriever, Retriever


class KVMem:
    """A language model that has read your documents. May be used from any thread; close it, or use it in `with`.

    Args:
        model: a hub id, a local directory, a GGUF file, "smollm2", a `LanguageModel`, a transformers model (then with
            `tokenizer`), or the address of a vLLM server, `vllm://host:port/model`.
        store: a directory, a `Store`, or None to keep everything in memory only.
        tokenizer: of a model object; of a model on a server, also its directory or hub id.
        settings: a `Settings`.
        retriever: chooses chunks when they do not all fit; BM25 by default.
        options: any field of `Settings`, `ModelSettings`, `StoreSettings` and `RemoteSettings` by name.

    Raises:
        ModelNotFoundError: there is no such model.
        ModelError: the model cannot be used.
        RemoteError: the server cannot be reached or used.
        StoreError: the store cannot be used.
        InputError: an argument cannot be used.

    Example:
        ```python
        with KVMem("smollm2", store="./kv") as mem:
            mem.add("The lease begins on 1 April 2025.", id="lease")
            print(mem.ask("When does the lease begin?", max_tokens=32).text)
        ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | AnyModel | PreTrainedModel,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        settings: Settings | None = None,
        retriever: Retriever | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.settings = Settings.parse(settings, options)
        self.model, self._owns_model = open_model(model, tokenizer, self.settings, options)
        self._owns_store = store is None or isinstance(store, (str, os.PathLike))
        self.store = open_store(store, self.settings.storage)
        self.retriever: Retriever = retriever or BM25Retriever()
        namespace, database = self.settings.namespace, self.store.database
        typesetter = Typesetter(self.model)
        self._typesetter = typesetter
        chunker = Chunker(self.model, typesetter, self.settings.split)
        self._corpora = Corpora(database, namespace, chunker)
        self._backend = open_backend(self.model, self.store, self.settings, typesetter)
        self._requests = RequestBuilder(
            self.model,
            chunker,
            typesetter,
            self.retriever,
            self._backend.arrange,
            self.settings,
            reorders=self._backend.reorders,
        )
        self._library = Library(
            self.model.window, self.store, self._corpora, chunker, self._backend, self._requests, self.settings
        )
        self._threads = Threads(database, namespace)
        self._worker = Worker(self.model)
        self._documents = Collection(self, self._corpora.open(""), "", self._library, self._worker)

    @property
    def local_model(self) -> LanguageModel:
        """The model, if it runs in this process. Raises InputError."""
        return self._backend.local_model

    @property
    def limitation(self) -> str | None:
        """Why caches are reused as exact prefixes only; None if they can be blended."""
        return self._backend.limitation

    # Documents

    def add(
        self,
        document: Any,
        id: str | None = None,  # noqa: A002
        metadata: Metadata | None = None,
        *,
        read: bool = True,
        cancellation: Cancellation | None = None,
    ) -> Document:
        """Read a document and keep it; see `Collection.add`."""
        return self._documents.add(document, id, metadata, read=read, cancellation=cancellation)

    def add_all(
        self, documents: Iterable[Any], progress: Progress | None = None, *, read: bool = True
    ) -> Sequence[Document]:
        """Add many documents; see `Collection.add_all`."""
        return self._documents.add_all(documents, progress, read=read)

    def update(self, id: str, document: Any, metadata: Metadata | None = None) -> Document:  # noqa: A002
        """Replace a document that is there; see `Collection.update`."""
        return self._documents.update(id, document, metadata)

    def get(self, id: str) -> Document:  # noqa: A002
        """The document. Raises UnknownDocumentError."""
        return self._documents.get(id)

    def list(self) -> Sequence[Document]:
        """All documents, in the order they were added; those of collections are not among them."""
        return self._documents.list()

    def split(self, text: str) -> tuple[str, ...]:
        """The chunks that a text is cut into when it is added."""
        return self._documents.split(text)

    def chunks(self) -> Sequence[Chunk]:
        """The chunks of all documents, in order."""
        return self._documents.chunks()

    def remove(self, id: str) -> None:  # noqa: A002
        """Remove a document and every cache of text that no other document has. Raises UnknownDocumentError."""
        self._documents.remove(id)

    def collection(self, name: str | None = None) -> Collection:
        """Documents of their own, apart from the engine's.

        Args:
            name: keeps them in the store under this name, also after a restart. None keeps the documents in memory, for
                as long as the collection is used; their caches are stored all the same.

        Raises:
            InputError: for an empty name.
        """
        if name is not None and (not isinstance(name, str) or not name):
            raise InputError(f"name={name!r} cannot name a collection. Give a text that is not empty, or None.")
        self._worker.check_open()
        return Collection(self, self._corpora.open(name), name, self._library, self._worker)

    def collections(self) -> Sequence[str]:
        """The names of the collections that have documents."""
        self._worker.check_open()
        return self._corpora.names()

    def clear(self) -> None:
        """Remove every document, those of collections too, and every cache of this namespace."""
        self._worker.run(self._library.clear)

    def stats(self) -> Stats:
        """Counts of the documents and of the store."""
        self._worker.check_open()
        return self._library.stats(self._documents.corpus)

    def read(self, context: Iterable[Any]) -> None:
        """Read texts or documents, as `ask` takes them for context, without adding them: a later prompt finds them
        read. Raises InputError, EmptyInputError, PromptTooLongError."""
        documents = [as_document(item) for item in check_context(context)]
        self._worker.run(lambda: self._library.read(documents, self._worker.closing))

    def forget_text(self, text: Any) -> None:
        """Remove the caches of a text or document that was only read, unless a document has the same text."""
        document = as_document(text)
        self._worker.run(lambda: self._library.forget_text(document))

    def forget_user(self, namespace: str | None = None) -> int:
        """Remove every byte of a namespace from the store: documents, memories, conversations and caches.

        Args:
            namespace: the engine's own by default.

        Returns:
            How many cache entries were removed.

        Raises:
            StoreError: the store cannot be used.
        """
        name = self.settings.namespace if namespace is None else namespace
        return self._worker.run(lambda: self._library.forget_namespace(name))

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
        """Remove a conversation and its caches. Raises UnknownThreadError."""
        self._worker.run(lambda: self._library.forget_spans(self._threads.remove(thread)))

    # Questions

    def ask(
        self,
        question: str,
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        system: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """Answer a question from the documents.

        Args:
            question: the question.
            context: texts or documents, as in `add`, to answer from instead; they are cached, and not added. Or
                sources, as `retrieve` and `answer.sources` have them.
            collection: answer from this collection instead of the engine's own documents.
            documents: answer from these only: their ids, or a filter over their metadata such as
                `{"tenant": "a", "year": {"$gte": 2024}}`.
            retriever: chooses chunks when they do not all fit, instead of the engine's.
            system: another system prompt.
            options: see `GenerateOptions`.

        Raises:
            EmptyInputError: a text, the question or the documents are empty.
            InputError: an argument cannot be used.
            PromptTooLongError: the prompt does not fit the window.
            UnknownDocumentError: there is no document with that id.
            AnswerTimeoutError: the timeout passed.
            ClosedError: the engine was closed or the work cancelled.
        """
        scope = self._scope(context, collection, documents, retriever)
        return self._ask(question, scope, system, options).answer

    def stream(
        self,
        question: str,
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        system: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AnswerStream:
        """Like `ask`, as an iterator of text pieces; its `.answer` is the whole answer."""
        return self._ask(question, self._scope(context, collection, documents, retriever), system, options)

    def _ask(self, question: str, scope: Scope, system: str | None, options: GenerateOptions) -> AnswerStream:
        started = time.perf_counter()
        sampling = as_sampling(options, self.settings.max_tokens)

        def build(cancellation: Cancellation) -> Request:
            return self._requests.for_question(started, question, scope, system, sampling.max_tokens, cancellation)

        return self._start(build, sampling, options)

    def batch(
        self,
        questions: Sequence[str | Sequence[Message]],
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        system: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Sequence[Answer]:
        """Answer several questions, or continue several conversations (lists of messages).

        Those whose prompts differ in the last part only are decoded together, behind one cache.

        What is recomputed is chosen for the questions of such a group together. Answers are in the order of the
        questions; sampled ones differ from those that `ask` would give. timeout is for all of them together.
        Arguments and errors as in `ask`; bad input raises before any answer begins.
        """
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise InputError(f"questions is a {type(questions).__name__}. Give a list of questions.")
        asked, kept = tuple(questions), None if context is None else tuple(check_context(context))
        scope = self._scope(kept, collection, documents, retriever)
        started = time.perf_counter()
        sampling = as_sampling(options, self.settings.max_tokens)
        settings = self._backend.resolve(self._backend.parse_blend(options.get("blend")))

        named = context is not None or collection is not None or documents is not None

        def build(asked: str | Sequence[Message], stop: Cancellation) -> Request:
            room = sampling.max_tokens
            if isinstance(asked, str):
                return self._requests.for_question(started, asked, scope, system, room, stop)
            return self._requests.for_messages(started, asked, scope if named else None, room, None, stop)

        def work() -> Sequence[Answer]:
            cancellation = Cancellation(options.get("timeout"), self._worker.closing)
            with self._worker.turn():
                requests = [build(question, cancellation) for question in asked]
            return self._backend.answer_all(requests, settings, sampling, cancellation)

        return self._worker.run(work)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """Continue a conversation: `[{"role": "user", "content": "..."}]`, in the roles of the model's template.

        Long texts in messages are cut and cached, so that what was seen before is not computed again, wherever it
        stands. The engine's system prompt, if it was set, is used unless the messages begin with one.

        Args:
            messages: the conversation, up to the message to answer.
            context: as in `ask`, put at the end of the system message. Without context, collection and documents, no
                documents are in the prompt.
            collection: as in `ask`.
            documents: as in `ask`.
            retriever: as in `ask`.
            thread: a name under which the conversation is kept, across restarts too: see `history`. Its next turn, or
                another branch of it (a retry, an edited message), then reuses everything that was read or said before.
            tools: functions the model may call, by JSON schema as in OpenAI's API; calls are in `answer.tool_calls`.
            tool_choice: "auto", "none", "any" or a function's name; a forced call follows its schema token by token,
                and so does every answer of a model whose template does not know tools.
            options: see `GenerateOptions`. An answer follows `schema` unless it is a call.

        When the window is full, the oldest turns are left out, and `plan` says so.

        Raises:
            EmptyInputError: a text, the question or the documents are empty.
            InputError: an argument cannot be used.
            PromptTooLongError: the prompt does not fit the window.
            AnswerTimeoutError: the timeout passed.
            ClosedError: the engine was closed or the work cancelled.
        """
        return self.stream_chat(
            messages,
            context=context,
            collection=collection,
            documents=documents,
            retriever=retriever,
            thread=thread,
            tools=tools,
            tool_choice=tool_choice,
            **options,
        ).answer

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Unpack[GenerateOptions],
    ) -> AnswerStream:
        """Like `chat`, as an iterator of text pieces (tool calls included, as the model writes them); its `.answer` is
        the whole answer."""
        started = time.perf_counter()
        if not tools and tool_choice not in ("auto", "none"):
            raise InputError(f"tool_choice={tool_choice!r} needs tools. Give some.")
        toolbox = Toolbox(tuple(tools), tool_choice, self.model.knows_tools) if tools else None
        named = collection is not None or documents is not None
        scope = self._scope(context, collection, documents, retriever) if context is not None or named else None
        given = check_messages(messages)
        conversation = None if thread is None else (check_name(thread), [plain_message(message) for message in given])
        if toolbox is not None:
            given = toolbox.instruct(given, options.get("schema"))
            options["schema"] = toolbox.schema_with(options.get("schema"))
        for_template = toolbox.for_template if toolbox is not None else None
        sampling = as_sampling(options, self.settings.max_tokens)

        def build(cancellation: Cancellation) -> Request:
            room = sampling.max_tokens
            return self._requests.for_messages(started, given, scope, room, for_template, cancellation)

        return self._start(build, sampling, options, toolbox, conversation)

    def complete(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Answer:
        """Continue a prompt as it is, without the chat template; special tokens in a text are interpreted.

        Args:
            prompt: a text, or token ids. What was computed for an earlier prompt is reused.
            options: see `GenerateOptions`.

        Raises:
            EmptyInputError: a text, the question or the documents are empty.
            InputError: an argument cannot be used.
            PromptTooLongError: the prompt does not fit the window.
            AnswerTimeoutError: the timeout passed.
            ClosedError: the engine was closed or the work cancelled.
        """
        return self.stream_complete(prompt, **options).answer

    def stream_complete(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Like `complete`, as an iterator of text pieces; its `.answer` is the whole answer."""
        started = time.perf_counter()
        sampling = as_sampling(options, self.settings.max_tokens)

        def build(_: Cancellation) -> Request:
            return self._requests.for_raw(started, prompt, sampling.max_tokens)

        return self._start(build, sampling, options)

    def stream_prompt(self, prompt: Request, **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Answer a prompt that `build_prompt` made, as an iterator of text pieces; its `.answer` is the whole answer.

        Room for the answer was kept when the prompt was built: `max_tokens` must not be larger than it was then.
        """
        sampling = as_sampling(options, self.settings.max_tokens)
        return self._start(lambda _: prompt, sampling, options)

    def _scope(
        self,
        context: ContextTexts,
        collection: Collection | str | None,
        documents: DocumentFilter | None,
        retriever: Retriever | None,
    ) -> Scope:
        if isinstance(collection, str):
            collection = self.collection(collection)
        if collection is not None and collection.mem is not self:
            raise InputError("This collection belongs to another KVMem. Make one by this engine's collection().")
        corpus = (self._documents if collection is None else collection).corpus
        return Scope(corpus, documents, context, retriever)

    def _start(
        self,
        build: Callable[[Cancellation], Request],
        sampling: Sampling,
        options: GenerateOptions,
        toolbox: Toolbox | None = None,
        conversation: tuple[str, Sequence[Message]] | None = None,
    ) -> AnswerStream:
        self._worker.check_open()
        parsed = self._backend.parse_blend(options.get("blend"))

        def work(listener: Listener, cancellation: Cancellation, settings: BlendSettings) -> Answer:
            with self._worker.turn():
                request = build(cancellation)
            begun = None
            if conversation is not None:
                begun = self._threads.begin(conversation[0], self.model.fingerprint)
                request = replace(request, prompt=recut(request.prompt, begun.branches))
            listener.planned(request.plan, request.sources)
            turn = None
            try:
                answer, turn = self._backend.answer(
                    request, settings, sampling, listener, cancellation, begun is not None
                )
            finally:
                if begun is not None and turn is None:
                    # What was read of it is stored all the same, and is removed with the conversation.
                    self._keep(begun, Turn(None, request.prompt.said))
            if answer.finish_reason == "cancelled" and not cancellation.cancelled:
                cancellation.check()
            if toolbox is not None:
                text, calls = toolbox.read(answer.text)
                answer = replace(answer, text=text, tool_calls=calls)
            if begun is not None and conversation is not None and turn is not None:
                self._keep(begun, turn, [*conversation[1], answer.message])
            return answer

        return self._worker.stream(work, options.get("timeout"), lambda: self._backend.resolve(parsed))

    def _keep(self, begun: Begun, turn: Turn, messages: Sequence[Message] | None = None) -> None:
        """Write down a turn; if its conversation was removed meanwhile, its caches go, too."""
        if not self._threads.keep(begun, self.model.fingerprint, turn, messages):
            self._library.forget_spans({self.model.fingerprint: turn.spans})

    def retrieve(
        self,
        question: str,
        k: int,
        *,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
    ) -> tuple[Source, ...]:
        """The `k` most relevant chunks, best first, as the retriever scores them; irrelevant ones are left out.

        The model is not run. Arguments and errors as in `ask`.
        """
        scope = self._scope(None, collection, documents, retriever)
        return self._worker.run(lambda: self._requests.retrieve(question, k, scope))

    def plan(
        self,
        question: str,
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
    ) -> Plan:
        """What `ask` would put into the prompt, and why. The model is not run. Arguments and errors as in `ask`."""
        room = self.settings.max_tokens if max_tokens is None else max_tokens
        scope = self._scope(context, collection, documents, retriever)
        return self._worker.run(lambda: self._requests.for_question(0.0, question, scope, system, room).plan)

    def build_prompt(
        self,
        question: str | Sequence[Message],
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        retriever: Retriever | None = None,
        system: str | None = None,
        search: str | None = None,
        max_tokens: int | None = None,
    ) -> Request:
        """The prompt that `ask` (for a question) or `chat` (for messages) would run: its tokens, plan and sources.

        The model is not run. Arguments and errors as there.

        Args:
            question: a question, or messages. Documents go to the end of the system message, or where
                `kvmem.prompt.layout.CONTEXT` stands in a message's content.
            context: as in `ask`.
            collection: as in `ask`.
            documents: as in `ask`.
            retriever: as in `ask`.
            system: as in `ask`.
            search: what chunks are scored for; the question, or the last message, by default.
            max_tokens: room that is kept for the answer.
        """
        started = time.perf_counter()
        room = self.settings.max_tokens if max_tokens is None else max_tokens
        scope = self._scope(context, collection, documents, retriever)
        if isinstance(question, str):
            return self._worker.run(lambda: self._requests.for_question(started, question, scope, system, room))
        named = context is not None or collection is not None or documents is not None
        given = scope if named else None
        return self._worker.run(
            lambda: self._requests.for_messages(started, question, given, room, None, search=search)
        )

    def prefill(
        self,
        question: str,
        *,
        context: ContextTexts = None,
        collection: Collection | str | None = None,
        documents: DocumentFilter | None = None,
        system: str | None = None,
        blend: Blend = None,
    ) -> Prefill:
        """The composed and blended state for a question, without generating; compare it with `model(token_ids)`.

        Arguments and errors as in `ask`.
        """
        started = time.perf_counter()
        settings = self._backend.resolve(self._backend.parse_blend(blend))
        scope = self._scope(context, collection, documents, None)

        def work() -> Prefill:
            stop = self._worker.closing
            request = self._requests.for_question(started, question, scope, system, self.settings.max_tokens, stop)
            return self._backend.prefill(request, settings, stop)

        return self._worker.run(work)

    # Lifetime

    @property
    def closed(self) -> bool:
        return self._worker.closed

    def close(self) -> None:
        """Cancel running answers and free the buffer, and the store unless it was handed in as an object.

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

    def __copy__(self) -> KVMem:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KVMem:
        """The same engine: copies of a component share it."""
        return self

    def __reduce__(self) -> Any:
        raise InputError("A KVMem cannot be pickled. Pickle what it was opened with, and open it again.")

    def __enter__(self) -> KVMem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
