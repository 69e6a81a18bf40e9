"""CachedContextChain: a drop-in replacement for create_retrieval_chain(retriever, combine_documents_chain)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, convert_to_messages
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, PrivateAttr

from kvmem import Collection, EmptyInputError, InputError, KVMem, Source
from kvmem.library.request import Request
from kvmem.options import OPTION_NAMES, check_names
from kvmem.prompt.layout import CONTEXT, DEFAULT_SYSTEM
from kvmem.results import rank
from kvmem.text.filters import check_filter, matches
from langchain_kvmem.chat_model import PREPARED, ChatKVMem, Prepared
from langchain_kvmem.convert import from_document, from_documents, to_documents, to_messages
from langchain_kvmem.errors import as_langchain
from langchain_kvmem.retriever import KVMemRetriever, only_ranks

Inputs = dict[str, Any]
_OPTIONS = OPTION_NAMES | {"system", "filter", "context"}


@dataclass(frozen=True)
class _Turn:
    """One question. messages: what the model sees, as LangChain's. documents: what it answers from."""

    request: Request
    messages: list[BaseMessage]
    documents: list[Document]


class CachedContextChain(Runnable[Inputs, Inputs]):
    """Answers `{"input": question}` with `{"input", "context", "answer", "usage", "plan"}`, from documents read once.

    With `"chat_history"` in the input (messages, or pairs of role and text), the question is the next turn of that
    conversation. `context` holds the chunks in the prompt as LangChain documents, the most relevant first. Streaming
    yields the input, then the context, then pieces of the answer, then usage and plan; added up they are the result of
    `invoke`. Callbacks see a run of a retriever and one of a chat model, as with LangChain's own chain.

    What it answers from: the engine's own documents, or those of a collection; with a retriever, exactly the documents
    that it returns. Only a retriever of a collection that is known to rank and nothing else (a vector store's without
    filter or threshold, say) is not asked while the whole collection fits the window.

    Args:
        mem: an engine or a collection.
        retriever: see above.
        system_prompt: stands before the documents; a template of the input's variables, such as
            "Answer in {language}.", where "{context}" marks the place of the documents (by default, its end).
        top_sources: how many documents `context` has at most; None for all.
        options: options of `KVMem.ask` for every call, such as `max_tokens` or `blend`; `filter`, the ids of the
            documents that count, or a filter over their metadata. Keyword arguments of `invoke`, `stream` and the
            others override them.

    Raises:
        InputError: for an option that does not exist.

    Example:
        ```python
        from langchain_core.documents import Document
        from langchain_kvmem import CachedContextChain

        documents = [Document(page_content="The rent is 3,200 euros a month.")]
        chain = CachedContextChain.from_documents(documents, "smollm2", store="./kv", max_tokens=32)
        print(chain.invoke({"input": "How much is the rent?"})["answer"])
        ```
    """

    def __init__(
        self,
        mem: KVMem | Collection,
        *,
        retriever: BaseRetriever | None = None,
        system_prompt: str | None = None,
        top_sources: int | None = None,
        **options: Any,
    ) -> None:
        check_names(options, _OPTIONS)
        self.collection = mem if isinstance(mem, Collection) else None
        self.mem = mem.mem if isinstance(mem, Collection) else mem
        self.retriever, self.top_sources = retriever, top_sources
        if system_prompt is not None:
            options["system"] = system_prompt
        self.options = options
        self._llm = ChatKVMem(mem=self.mem)
        _variables(options.get("system"))

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        model: str | KVMem = "smollm2",
        store: str | None = None,
        *,
        collection: str | None = None,
        document_prompt: BasePromptTemplate[str] | None = None,
        retriever: BaseRetriever | None = None,
        **options: Any,
    ) -> CachedContextChain:
        """A chain that answers from these documents, and no others that its engine or store may hold.

        Each is read once; those whose text was read before cost nothing. Documents without an id are identified by
        their content.

        Args:
            documents: the documents. Those without text are logged and left out.
            model: a model as `KVMem` takes it, or an open engine.
            store: a directory for the caches; None keeps them in memory.
            collection: keeps the documents in the store under this name, and removes those that were in it and are not
                given. Without a name, the chain keeps them, and the store has their caches only.
            document_prompt: how a document is shown, by its `page_content` and metadata; as its text by default.
            retriever: see `CachedContextChain`.
            options: as there.

        Raises:
            InputError: for bad documents or options.
        """
        mem = model if isinstance(model, KVMem) else KVMem(model, store)
        given = documents if document_prompt is None else [_formatted(item, document_prompt) for item in documents]
        kept = mem.collection(collection)
        chain = cls(kept, retriever=retriever, **options)
        kept.set_all(from_documents(given))
        return chain

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        model: str | KVMem = "smollm2",
        store: str | None = None,
        metadatas: Iterable[dict[str, Any]] | None = None,
        **options: Any,
    ) -> CachedContextChain:
        """Like `from_documents`, from plain texts."""
        texts = list(texts)
        extra = list(metadatas) if metadatas is not None else [{} for _ in texts]
        if len(extra) != len(texts):
            raise InputError(f"There are {len(texts)} texts but {len(extra)} metadatas. Give one for each text.")
        documents = [Document(page_content=t, metadata=m) for t, m in zip(texts, extra, strict=True)]
        return cls.from_documents(documents, model, store, **options)

    def add_documents(self, documents: Iterable[Document]) -> None:
        """Answer from these, too. Those of an id that is there are replaced."""
        kept = from_documents(documents)
        (self.mem if self.collection is None else self.collection).add_all(kept)

    # Runs

    def invoke(self, input: Inputs, config: RunnableConfig | None = None, **kwargs: Any) -> Inputs:  # noqa: A002
        return self._call_with_config(self._invoke, input, config, **kwargs)

    def _invoke(self, inputs: Inputs, run_manager: Any, config: RunnableConfig, **kwargs: Any) -> Inputs:
        chunks = list(self._stream(inputs, config, kwargs))
        return _added(inputs, chunks)

    async def ainvoke(self, input: Inputs, config: RunnableConfig | None = None, **kwargs: Any) -> Inputs:  # noqa: A002
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    async def _ainvoke(self, inputs: Inputs, run_manager: Any, config: RunnableConfig, **kwargs: Any) -> Inputs:
        chunks = [chunk async for chunk in self._astream(inputs, config, kwargs)]
        return _added(inputs, chunks)

    def stream(
        self,
        input: Inputs,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Inputs]:
        yield from self._transform_stream_with_config(iter([input]), self._transform, config, **kwargs)

    def _transform(
        self, inputs: Iterator[Inputs], run_manager: Any, config: RunnableConfig, **kwargs: Any
    ) -> Iterator[Inputs]:
        for item in inputs:
            yield AddableDict(item)
            yield from self._stream(item, config, kwargs)

    async def astream(
        self,
        input: Inputs,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Inputs]:
        async def once() -> AsyncIterator[Inputs]:
            yield input

        async for chunk in self._atransform_stream_with_config(once(), self._atransform, config, **kwargs):
            yield chunk

    async def _atransform(
        self, inputs: AsyncIterator[Inputs], run_manager: Any, config: RunnableConfig, **kwargs: Any
    ) -> AsyncIterator[Inputs]:
        async for item in inputs:
            yield AddableDict(item)
            async for chunk in self._astream(item, config, kwargs):
                yield chunk

    def _stream(self, inputs: Inputs, config: RunnableConfig, kwargs: Mapping[str, Any]) -> Iterator[Inputs]:
        options, call = self._options(kwargs)
        source = _Source(self, inputs, options)
        documents = source.invoke(_question(inputs), _child(config, "retrieve_documents"))
        yield AddableDict(context=documents)
        turn = source.turn
        token = PREPARED.set(Prepared(self._llm, turn.request))
        try:
            pieces = self._llm.stream(turn.messages, _child(config, "answer"), **call)
            piece: Any = next(pieces, None)
        finally:
            PREPARED.reset(token)
        while piece is not None:
            yield from _shown(piece)
            piece = next(pieces, None)

    async def _astream(
        self, inputs: Inputs, config: RunnableConfig, kwargs: Mapping[str, Any]
    ) -> AsyncIterator[Inputs]:
        options, call = self._options(kwargs)
        source = _Source(self, inputs, options)
        documents = await source.ainvoke(_question(inputs), _child(config, "retrieve_documents"))
        yield AddableDict(context=documents)
        turn = source.turn
        pieces = self._llm.astream(turn.messages, _child(config, "answer"), **call)
        token = PREPARED.set(Prepared(self._llm, turn.request))
        try:
            piece: Any = await anext(pieces, None)
        finally:
            PREPARED.reset(token)
        try:
            while piece is not None:
                for shown in _shown(piece):
                    yield shown
                piece = await anext(pieces, None)
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What builds the prompt, and what generates the answer. Raises InputError."""
        options = {**self.options, **kwargs}
        check_names(options, _OPTIONS)
        call = {name: value for name, value in options.items() if name in OPTION_NAMES}
        return {name: value for name, value in options.items() if name not in call or name == "max_tokens"}, call

    # What is in the prompt

    def build(self, inputs: Inputs, options: dict[str, Any], retrieved: list[Document] | None) -> _Turn | None:
        """The prompt of a question; None where the retriever has to be asked first."""
        question, history = _question(inputs), _history(inputs)
        system = _fill(options.get("system"), inputs, self.mem.settings.system)
        if options.get("context") is not None and options.get("filter") is not None:
            raise InputError("context and filter cannot be combined. Give as context what passes the filter.")
        if retrieved is not None:
            retrieved = _passing(retrieved, options.get("filter"))
        scope = self._scope(options, retrieved)
        if scope is None:
            return None
        messages: list[dict[str, Any]] = [{"role": "system", "content": system.pieces}, *to_messages(history)]
        messages.append({"role": "user", "content": question})
        room = options.get("max_tokens")
        with as_langchain():
            request = self.mem.build_prompt(messages, max_tokens=room, **scope)
        beyond = request.plan.mode != "whole"
        if retrieved is None and self.retriever is not None and options.get("context") is None and beyond:
            return None
        if retrieved is None and not request.sources:
            raise EmptyInputError("There is nothing to answer from: the chain has no documents. Add some first.")
        if retrieved is None or beyond:
            retrieved = to_documents(rank(request.sources, self.top_sources))
        texts = _texts(request.sources)
        return _Turn(request, [SystemMessage(system.text(texts)), *history, HumanMessage(question)], retrieved)

    def _scope(self, options: dict[str, Any], retrieved: list[Document] | None) -> dict[str, Any] | None:
        if retrieved is not None:
            kept = [from_document(document) for document in _with_text(retrieved)]
            return {"context": kept} if kept else {}
        if options.get("context") is not None:
            return {"context": options["context"]}
        if self.retriever is not None and not self._knows_all():
            return None
        # An empty filter stands for all documents of the engine.
        documents = options.get("filter")
        return {"collection": self.collection, "documents": {} if documents is None else documents}

    def _knows_all(self) -> bool:
        """Whether the documents here are those that the retriever ranks."""
        if self.collection is None:
            given = self.retriever
            ours = isinstance(given, KVMemRetriever) and given.mem is self.mem and only_ranks(given)
            return ours and len(self.mem.list()) > 0
        return self.retriever is not None and only_ranks(self.retriever) and len(self.collection) > 0


class _Source(BaseRetriever):
    """Builds the prompt of one question, as a run of a retriever that callbacks see."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    _chain: CachedContextChain = PrivateAttr()
    _inputs: Inputs = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()
    _turn: _Turn | None = PrivateAttr(default=None)

    def __init__(self, chain: CachedContextChain, inputs: Inputs, options: dict[str, Any]) -> None:
        super().__init__()
        self._chain, self._inputs, self._options = chain, inputs, options

    @property
    def turn(self) -> _Turn:
        if self._turn is None:
            raise AssertionError("the prompt was not built")
        return self._turn

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        self._turn = self._chain.build(self._inputs, self._options, None)
        if self._turn is None and self._chain.retriever is not None:
            found = self._chain.retriever.invoke(query, {"callbacks": run_manager.get_child()})
            self._turn = self._chain.build(self._inputs, self._options, found)
        return self.turn.documents

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        self._turn = await asyncio.to_thread(self._chain.build, self._inputs, self._options, None)
        if self._turn is None and self._chain.retriever is not None:
            found = await self._chain.retriever.ainvoke(query, {"callbacks": run_manager.get_child()})
            self._turn = await asyncio.to_thread(self._chain.build, self._inputs, self._options, found)
        return self.turn.documents


@dataclass(frozen=True)
class _System:
    """A system prompt, before and behind the documents."""

    before: str
    after: str

    @property
    def pieces(self) -> list[Any]:
        return [self.before, CONTEXT, *([self.after] if self.after else [])]

    def text(self, context: str) -> str:
        return f"{self.before}{context}{self.after}".strip("\n")


def _variables(system: str | None) -> list[str]:
    """Names in a template. Raises InputError for one that is not well-formed."""
    try:
        return [name for _, name, _, _ in Formatter().parse(system or "") if name is not None]
    except ValueError as error:
        raise InputError(
            f"The system prompt is not a valid template: {error}. Double the braces that are text: {{{{ and }}}}."
        ) from None


def _fill(system: str | None, inputs: Inputs, default: str | None) -> _System:
    """A system prompt with the input's variables in place. Raises InputError for one that is missing."""
    if system is None:
        return _System((default if default is not None else DEFAULT_SYSTEM) + "\n\n", "")
    names = [name for name in _variables(system) if name != "context"]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(
            f"The system prompt needs {missing[0]!r}, which the input does not have. Give "
            f"{{'input': ..., {missing[0]!r}: ...}}, or double the braces if they are text."
        )
    mark = "\u241f"
    filled = system.format(**{**inputs, "context": mark})
    before, found, after = filled.partition(mark)
    return _System(before if found else before + "\n\n", after)


def _with_text(documents: list[Document]) -> list[Document]:
    return [document for document in documents if document.page_content.strip()]


def _passing(documents: list[Document], wanted: Any) -> list[Document]:
    """What passes a filter: ids, or conditions on metadata."""
    if wanted is None:
        return documents
    if not isinstance(wanted, Mapping):
        ids = set(wanted)
        return [document for document in _with_text(documents) if from_document(document).id in ids]
    check_filter(wanted)
    return [document for document in documents if matches(document.metadata, wanted)]


def _texts(sources: Sequence[Source]) -> str:
    return "\n\n".join(source.text.strip("\n") for source in sources)


def _formatted(document: Document, template: BasePromptTemplate[str]) -> Document:
    return document.model_copy(update={"page_content": format_document(document, template)})


def _question(inputs: Inputs) -> str:
    if not isinstance(inputs, dict) or not isinstance(inputs.get("input"), str):
        raise InputError('The chain takes a mapping with the question: {"input": "..."}.')
    return str(inputs["input"])


def _history(inputs: Inputs) -> list[BaseMessage]:
    return convert_to_messages(inputs.get("chat_history") or [])


def _child(config: RunnableConfig, name: str) -> RunnableConfig:
    return patch_config(config, run_name=name)


def _shown(piece: AIMessage) -> Iterator[Inputs]:
    """What a chunk of the model adds to the result."""
    if piece.text:
        yield AddableDict(answer=piece.text)
    if piece.usage_metadata is not None:
        yield AddableDict(answer="", usage=piece.usage_metadata, plan=piece.response_metadata.get("plan"))


def _added(inputs: Inputs, chunks: list[Inputs]) -> Inputs:
    total: Any = AddableDict(inputs)
    for chunk in chunks:
        total = total + chunk
    return dict(total)
