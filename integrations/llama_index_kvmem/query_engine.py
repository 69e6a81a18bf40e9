"""KVMemQueryEngine: in the place of RetrieverQueryEngine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatResponse, MessageRole
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base import EventContext
from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle

from kvmem import Answer, AnswerStream, InputError, KVMem, Source
from llama_index_kvmem.convert import count, describe, said, to_document, to_documents, to_nodes
from llama_index_kvmem.llm import KVMemLLM

_NOTHING = "Empty Response"
_ARGUMENTS = {"retriever", "node_postprocessors", "streaming", "callback_manager"}
_OPTIONS = {"max_tokens", "temperature", "top_p", "stop", "seed", "blend", "system", "generate_kwargs"}


class KVMemQueryEngine(BaseQueryEngine):
    """Answers queries from documents read once: from all of them when they fit the window, else from nodes of the
    retriever (or, without one, from chunks that BM25 finds).

    The response's `source_nodes` are what is in the prompt, and its `metadata` tells the plan, the usage and the
    timings (of a streamed response: the plan). With `streaming`, `query` gives a `StreamingResponse` and `aquery` an
    `AsyncStreamingResponse`.

    mem: the engine, with its documents. retriever, node_postprocessors: choose nodes when not all documents fit, or
        always when `mem` has none. options: arguments of `KVMem.ask` for every query, such as `max_tokens`, `blend` or
        `system`.
    """

    def __init__(
        self,
        mem: KVMem,
        *,
        retriever: BaseRetriever | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        super().__init__(callback_manager)
        _check(options)
        self.mem = mem
        self.retriever = retriever
        self.node_postprocessors = tuple(node_postprocessors)
        self.streaming = streaming
        self.options = {**options.pop("generate_kwargs", {}), **options}

    @classmethod
    def from_documents(
        cls, documents: Iterable[BaseNode], model: str | KVMem = "smollm2", store: str | None = None, **options: Any
    ) -> KVMemQueryEngine:
        """Read documents or nodes into an engine; those it has read before cost nothing. Nodes are not cut again.

        Queries are answered from everything in the engine, what was added earlier included.
        """
        _check({name: value for name, value in options.items() if name not in _ARGUMENTS})
        mem = model if isinstance(model, KVMem) else KVMem(model, store)
        mem.add_all(to_documents(documents))
        return cls(mem, **options)

    @classmethod
    def from_index(
        cls,
        index: BaseIndex[Any],
        llm: KVMemLLM | KVMem,
        *,
        retriever_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> KVMemQueryEngine:
        """Read every node of an index; its retriever chooses among them when they do not all fit.

        The index has to keep its nodes (a vector store that stores texts itself may not). Raises InputError.
        """
        nodes = [node for node in index.docstore.docs.values() if node.get_content().strip()]
        if not nodes:
            raise InputError("The index keeps no nodes. Use from_args(retriever=index.as_retriever(), llm=llm).")
        retriever = index.as_retriever(**(retriever_kwargs or {}))
        return cls.from_documents(nodes, _engine(llm), retriever=retriever, **options)

    @classmethod
    def from_args(
        cls,
        retriever: BaseRetriever,
        llm: KVMemLLM | KVMem,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        streaming: bool = False,
        **options: Any,
    ) -> KVMemQueryEngine:
        """As `RetrieverQueryEngine.from_args`: the retriever's nodes are the context, and none is read twice."""
        return cls(
            _engine(llm),
            retriever=retriever,
            node_postprocessors=node_postprocessors or (),
            callback_manager=callback_manager,
            streaming=streaming,
            **options,
        )

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    # What is in the prompt

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """What the retriever and the postprocessors find; without a retriever, the four best chunks."""
        if self.retriever is None:
            return to_nodes(self.mem.retrieve(query_bundle.query_str, 4))
        nodes = self.retriever.retrieve(query_bundle)
        for postprocessor in self.node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Like `retrieve`."""
        if self.retriever is None:
            return await asyncio.to_thread(self.retrieve, query_bundle)
        nodes = await self.retriever.aretrieve(query_bundle)
        for postprocessor in self.node_postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    def _retrieves(self, query_bundle: QueryBundle) -> bool:
        """Whether the retriever is needed."""
        if self.retriever is None:
            return False
        if not self.mem.list():
            return True
        limits = {name: self.options[name] for name in ("max_tokens", "system") if name in self.options}
        return self.mem.plan(query_bundle.query_str, **limits).mode != "whole"

    # Answers

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(CBEventType.QUERY, query_bundle) as event:
            nodes = self.retrieve(query_bundle) if self._retrieves(query_bundle) else None
            response = self._respond(query_bundle, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(CBEventType.QUERY, query_bundle) as event:
            needed = await asyncio.to_thread(self._retrieves, query_bundle)
            nodes = await self.aretrieve(query_bundle) if needed else None
            response = await self._arespond(query_bundle, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer from `nodes`; the additional ones are named as sources only."""
        response = self._respond(query_bundle, nodes)
        response.source_nodes += additional_source_nodes or []
        return response

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Like `synthesize`."""
        response = await self._arespond(query_bundle, nodes)
        response.source_nodes += additional_source_nodes or []
        return response

    def _respond(self, query_bundle: QueryBundle, nodes: list[NodeWithScore] | None) -> RESPONSE_TYPE:
        if nodes is not None and not nodes:
            # As LlamaIndex's own synthesizers say it.
            return StreamingResponse(iter([_NOTHING])) if self.streaming else Response(_NOTHING)  # type: ignore[arg-type]
        with self._event(CBEventType.SYNTHESIZE, query_bundle):
            stream = self._open(query_bundle, nodes)
            if self.streaming:
                sources = _named(stream.sources, nodes)
                told = self._told(query_bundle, stream)
                return StreamingResponse(_pieces(stream, told), sources, {"plan": describe(stream.plan)})
            with self._told(query_bundle, stream):
                return _response(stream.answer, nodes)

    async def _arespond(self, query_bundle: QueryBundle, nodes: list[NodeWithScore] | None) -> RESPONSE_TYPE:
        if nodes is not None and not nodes:
            return AsyncStreamingResponse(_nothing()) if self.streaming else Response(_NOTHING)
        with self._event(CBEventType.SYNTHESIZE, query_bundle):
            stream = self._open(query_bundle, nodes)
            if self.streaming:
                sources = _named(await stream.wait_for_sources(), nodes)
                told = self._told(query_bundle, stream)
                return AsyncStreamingResponse(_apieces(stream, told), sources, {"plan": describe(stream.plan)})
            with self._told(query_bundle, stream):
                return _response(await stream.wait(), nodes)

    def _event(self, kind: CBEventType, query_bundle: QueryBundle) -> AbstractContextManager[EventContext]:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        return self.callback_manager.event(kind, payload=payload)

    @contextmanager
    def _told(self, query_bundle: QueryBundle, stream: AnswerStream) -> Iterator[None]:
        """The event of a call of an LLM, with the usage where `TokenCountingHandler` finds it."""
        messages = [said(MessageRole.USER, query_bundle.query_str)]
        with self.callback_manager.event(CBEventType.LLM, payload={EventPayload.MESSAGES: messages}) as event:
            yield
            answer = stream.answer
            usage = {"prompt_tokens": answer.usage.prompt, "completion_tokens": answer.usage.generated}
            response = ChatResponse(message=said(MessageRole.ASSISTANT, answer.text), raw={"usage": usage})
            event.on_end(payload={EventPayload.MESSAGES: messages, EventPayload.RESPONSE: response})

    def _open(self, query_bundle: QueryBundle, nodes: list[NodeWithScore] | None) -> AnswerStream:
        context = None if nodes is None else [to_document(found.node) for found in nodes]
        return self.mem.stream(query_bundle.query_str, context=context, **self.options)


def _engine(llm: KVMemLLM | KVMem) -> KVMem:
    if isinstance(llm, KVMem):
        return llm
    if not isinstance(llm, KVMemLLM):
        raise InputError(f"A {type(llm).__name__} keeps no caches. Give a KVMemLLM or a KVMem.")
    return llm.engine


def _check(options: dict[str, Any]) -> None:
    if unknown := options.keys() - _OPTIONS:
        raise InputError(f"{min(unknown)!r} is not known here. Known are: {', '.join(sorted(_OPTIONS))}.")


def _pieces(stream: AnswerStream, told: AbstractContextManager[None]) -> Generator[str, None, None]:
    with stream, told:
        yield from stream


async def _apieces(stream: AnswerStream, told: AbstractContextManager[None]) -> AsyncGenerator[str, None]:
    with stream, told:
        async for piece in stream:
            yield piece


async def _nothing() -> AsyncGenerator[str, None]:
    yield _NOTHING


def _named(sources: Iterable[Source], nodes: list[NodeWithScore] | None) -> list[NodeWithScore]:
    """Sources as nodes; those that were retrieved as they were given."""
    if nodes is None:
        return to_nodes(sources)
    taken = {source.document_id for source in sources}
    return [found for found in nodes if to_document(found.node).id in taken]


def _response(answer: Answer, nodes: list[NodeWithScore] | None) -> Response:
    metadata = {
        "plan": describe(answer.plan),
        "usage": count(answer.usage),
        "timings": dict(vars(answer.timings)),
        "finish_reason": answer.finish_reason,
    }
    return Response(answer.text, source_nodes=_named(answer.sources, nodes), metadata=metadata)
