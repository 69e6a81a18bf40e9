"""CachedContextChain: in the place of create_retrieval_chain(retriever, combine_documents_chain)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, convert_to_messages
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.utils import AddableDict

from kvmem import AnswerStream, EmptyInputError, InputError, KVMem
from langchain_kvmem.convert import to_documents, to_messages
from langchain_kvmem.retriever import RankedBy

logger = logging.getLogger("kvmem")
Inputs = dict[str, Any]


class CachedContextChain(Runnable[Inputs, Inputs]):
    """Answers `{"input": question}` with `{"input", "context", "answer"}`, from documents read once.

    With `"chat_history"` in the input (messages, or pairs of role and text), the question is the next turn of that
    conversation.

    `context` are the chunks in the prompt, as LangChain documents. Streaming yields the input, then the context,
    then pieces of the answer; added up they are the result of `invoke`.

    mem: the engine, with its documents. options: arguments of `KVMem.ask` for every call, such as `max_tokens`,
        `blend` or `system`; keyword arguments of `invoke`, `stream` and their like win over them.
    """

    def __init__(self, mem: KVMem, **options: Any) -> None:
        self.mem = mem
        self.options = options

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        model: str | KVMem = "smollm2",
        store: str | None = None,
        **options: Any,
    ) -> CachedContextChain:
        """Read `documents` into an engine; those it has read before cost nothing. `model` may be an engine.

        The chain answers from everything in the engine, what was added earlier included. Documents without an id are
        known by their content.

        system_prompt: stands before the documents. document_prompt: how a document is shown, by its `page_content` and
        metadata; without one, as its text. retriever: chooses chunks when they do not all fit the window.
        Raises InputError.
        """
        if "system_prompt" in options:
            options["system"] = options.pop("system_prompt")
        template: BasePromptTemplate[str] | None = options.pop("document_prompt", None)
        retriever: BaseRetriever | None = options.pop("retriever", None)
        if isinstance(model, KVMem):
            if retriever is not None:
                raise InputError("This engine has a retriever. Give the retriever to KVMem, or a model's name here.")
            mem = model
        else:
            mem = KVMem(model, store, retriever=None if retriever is None else RankedBy(retriever))
        given = list(documents)
        kept = [document for document in given if document.page_content.strip()]
        if len(kept) < len(given):
            logger.warning("kvmem: %d of %d documents have no text: left out", len(given) - len(kept), len(given))
        mem.add_all(document if template is None else _formatted(document, template) for document in kept)
        return cls(mem, **options)

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

    def invoke(self, input: Inputs, config: RunnableConfig | None = None, **kwargs: Any) -> Inputs:  # noqa: A002
        return self._call_with_config(self._invoke, input, config, **kwargs)

    def _invoke(self, inputs: Inputs, **kwargs: Any) -> Inputs:
        answer = self._open(inputs, kwargs).answer
        return {**inputs, "context": to_documents(answer.sources), "answer": answer.text}

    async def ainvoke(self, input: Inputs, config: RunnableConfig | None = None, **kwargs: Any) -> Inputs:  # noqa: A002
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    async def _ainvoke(self, inputs: Inputs, **kwargs: Any) -> Inputs:
        answer = await (await asyncio.to_thread(self._open, inputs, kwargs)).wait()
        return {**inputs, "context": to_documents(answer.sources), "answer": answer.text}

    def stream(
        self,
        input: Inputs,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Inputs]:
        yield from self._transform_stream_with_config(iter([input]), self._transform, config, **kwargs)

    def _transform(self, inputs: Iterator[Inputs], **kwargs: Any) -> Iterator[Inputs]:
        for item in inputs:
            with self._open(item, kwargs) as stream:
                yield AddableDict(item)
                yield AddableDict(context=to_documents(stream.sources))
                for piece in stream:
                    yield AddableDict(answer=piece)

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

    async def _atransform(self, inputs: AsyncIterator[Inputs], **kwargs: Any) -> AsyncIterator[Inputs]:
        async for item in inputs:
            with await asyncio.to_thread(self._open, item, kwargs) as stream:
                yield AddableDict(item)
                yield AddableDict(context=to_documents(await stream.wait_for_sources()))
                async for piece in stream:
                    yield AddableDict(answer=piece)

    def _open(self, inputs: Inputs, kwargs: dict[str, Any]) -> AnswerStream:
        options = {**self.options, **kwargs}
        question = _question(inputs)
        if not inputs.get("chat_history"):
            return self.mem.stream(question, **options)
        system = options.pop("system", None)
        context = options.pop("context", None)
        messages = to_messages([*convert_to_messages(inputs["chat_history"]), HumanMessage(question)])
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        documents = self.mem.list() if context is None else context
        if not documents:
            raise EmptyInputError("There is nothing to answer from: the corpus is empty. Add a document first.")
        return self.mem.stream_chat(messages, context=documents, **options)


def _formatted(document: Document, template: BasePromptTemplate[str]) -> Document:
    return document.model_copy(update={"page_content": format_document(document, template)})


def _question(inputs: Inputs) -> str:
    if not isinstance(inputs, dict) or not isinstance(inputs.get("input"), str):
        raise InputError('The chain takes a mapping with the question: {"input": "..."}.')
    return str(inputs["input"])
