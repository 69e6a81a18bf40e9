"""CachedContextChain: a drop-in replacement for create_retrieval_chain(retriever, combine_documents_chain)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config
from langchain_core.runnables.utils import AddableDict

from kvmem import Collection, InputError, KVMem
from kvmem.options import OPTION_NAMES, check_names
from langchain_kvmem.chat_model import ChatKVMem
from langchain_kvmem.convert import from_documents
from langchain_kvmem.prepared import PREPARED, Prepared
from langchain_kvmem.system_prompt import variables
from langchain_kvmem.turn import Inputs, PromptRun, TurnBuilder, question_of

_OPTIONS = OPTION_NAMES | {"system", "filter", "context", "chat_template_kwargs"}


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
        variables(options.get("system"))

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
        source = PromptRun(self._builder, inputs, options)
        documents = source.invoke(question_of(inputs), _child(config, "retrieve_documents"))
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
        source = PromptRun(self._builder, inputs, options)
        documents = await source.ainvoke(question_of(inputs), _child(config, "retrieve_documents"))
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

    @property
    def _builder(self) -> TurnBuilder:
        return TurnBuilder(self.mem, self.collection, self.retriever, self.top_sources)

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What builds the prompt, and what generates the answer. Raises InputError."""
        options = {**self.options, **kwargs}
        check_names(options, _OPTIONS)
        call = {name: value for name, value in options.items() if name in OPTION_NAMES}
        return {name: value for name, value in options.items() if name not in call or name == "max_tokens"}, call


def _formatted(document: Document, template: BasePromptTemplate[str]) -> Document:
    return document.model_copy(update={"page_content": format_document(document, template)})


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
