"""One question of a chain: what it is answered from, and its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage, convert_to_messages
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, PrivateAttr

from kvmem import Collection, EmptyInputError, InputError, KVMem, Source
from kvmem.library.request import Request
from kvmem.results import rank
from kvmem.text.filters import check_filter, matches
from langchain_kvmem.convert import from_document, to_documents, to_messages
from langchain_kvmem.errors import as_langchain
from langchain_kvmem.retriever import KVMemRetriever, only_ranks
from langchain_kvmem.system_prompt import fill

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One question. messages: what the model sees, as LangChain's. documents: what it answers from."""

    request: Request
    messages: list[BaseMessage]
    documents: list[Document]


@dataclass(frozen=True)
class TurnBuilder:
    """Builds the prompts of a chain; see `CachedContextChain` for the attributes."""

    mem: KVMem
    collection: Collection | None
    retriever: BaseRetriever | None
    top_sources: int | None

    def build(self, inputs: Inputs, options: dict[str, Any], retrieved: list[Document] | None) -> Turn | None:
        """The prompt of a question; None where the retriever has to be asked first."""
        question, history = question_of(inputs), history_of(inputs)
        system = fill(options.get("system"), inputs, self.mem.settings.system)
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
            template = options.get("chat_template_kwargs")
            request = self.mem.build_prompt(messages, max_tokens=room, chat_template_kwargs=template, **scope)
        beyond = request.plan.mode != "whole"
        if retrieved is None and self.retriever is not None and options.get("context") is None and beyond:
            return None
        if retrieved is None and not request.sources:
            raise EmptyInputError("There is nothing to answer from: the chain has no documents. Add some first.")
        if retrieved is None or beyond:
            retrieved = to_documents(rank(request.sources, self.top_sources))
        texts = _texts(request.sources)
        return Turn(request, [SystemMessage(system.text(texts)), *history, HumanMessage(question)], retrieved)

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


class PromptRun(BaseRetriever):
    """Builds the prompt of one question, as a run of a retriever that callbacks see."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    _builder: TurnBuilder = PrivateAttr()
    _inputs: Inputs = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()
    _turn: Turn | None = PrivateAttr(default=None)

    def __init__(self, builder: TurnBuilder, inputs: Inputs, options: dict[str, Any]) -> None:
        super().__init__()
        self._builder, self._inputs, self._options = builder, inputs, options

    @property
    def turn(self) -> Turn:
        if self._turn is None:
            raise AssertionError("the prompt was not built")
        return self._turn

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        self._turn = self._builder.build(self._inputs, self._options, None)
        if self._turn is None and self._builder.retriever is not None:
            found = self._builder.retriever.invoke(query, {"callbacks": run_manager.get_child()})
            self._turn = self._builder.build(self._inputs, self._options, found)
        return self.turn.documents

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        self._turn = await asyncio.to_thread(self._builder.build, self._inputs, self._options, None)
        if self._turn is None and self._builder.retriever is not None:
            found = await self._builder.retriever.ainvoke(query, {"callbacks": run_manager.get_child()})
            self._turn = await asyncio.to_thread(self._builder.build, self._inputs, self._options, found)
        return self.turn.documents


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


def question_of(inputs: Inputs) -> str:
    if not isinstance(inputs, dict) or not isinstance(inputs.get("input"), str):
        raise InputError('The chain takes a mapping with the question: {"input": "..."}.')
    return str(inputs["input"])


def history_of(inputs: Inputs) -> list[BaseMessage]:
    return convert_to_messages(inputs.get("chat_history") or [])
