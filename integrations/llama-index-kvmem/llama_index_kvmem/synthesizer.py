"""KVMemSynthesizer: CompactAndRefine whose first prompt holds all nodes, each with its own cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import llama_index.core.instrumentation as instrument
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.instrumentation.events.synthesis import GetResponseEndEvent, GetResponseStartEvent
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import NodeWithScore
from llama_index.core.types import RESPONSE_TEXT_TYPE

from kvmem import Document, PromptTooLongError
from kvmem.library.request import Request
from kvmem.prompt.layout import CONTEXT
from llama_index_kvmem.convert import describe, to_message, without_memories
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.prepared import PREPARED, Prepared

dispatcher = instrument.get_dispatcher(__name__)  # type: ignore[attr-defined]
_MARK = "\u241f"
# The prompt that the last answer of this context was for.
_LAST: ContextVar[Prepared | None] = ContextVar("kvmem_last", default=None)
# What the last answer of this context says about itself.
TOLD: ContextVar[dict[str, Any] | None] = ContextVar("kvmem_told", default=None)


class KVMemSynthesizer(CompactAndRefine):
    """Answers from nodes as `CompactAndRefine` does, with the same templates, events and callbacks.

    While the nodes fit the window, they are composed from their caches into one prompt. Beyond that, it is
    `CompactAndRefine` itself, over `llm`. The response's metadata has plan, usage and timings beside the nodes' own.

    Args:
        llm: the LLM.
        top_sources: how many source nodes a response has at most, the most relevant first; None for all, in the order
            of the prompt.
        options: as for `CompactAndRefine`.
    """

    def __init__(self, llm: KVMemLLM, *, top_sources: int | None = None, **options: Any) -> None:
        super().__init__(llm=llm, **options)
        self.kvmem = llm
        self.top_sources = top_sources

    @property
    def text_qa_template(self) -> BasePromptTemplate:
        """The template that nodes and question are put into."""
        return self._text_qa_template

    def messages(self, query_str: str) -> list[dict[str, Any]] | None:
        """The prompt with CONTEXT where the nodes go; None if the template does not contain them exactly once."""
        return self._split(self._formatted(query_str))[0]

    def fits(self, query_str: str, texts: Sequence[str]) -> bool:
        """Whether one prompt of all texts fits the window."""
        if self._composes:
            return self.build(query_str, texts) is not None
        given = self._text_qa_template.partial_format(query_str=query_str)
        prompt = self.kvmem._get_prompt(given, context_str="\n\n".join(texts))
        room = self.kvmem.metadata.context_window - self.kvmem.max_new_tokens
        return self.kvmem.engine.model.count_tokens(prompt) <= room

    @property
    def _composes(self) -> bool:
        """Whether prompts go through the model's chat template, where texts have places of their own."""
        return self.kvmem.is_chat_model and not self.kvmem.renders

    def build(self, query_str: str, texts: Sequence[str]) -> Request | None:
        """The prompt of all texts, if it fits the window."""
        if not self._composes:
            return None
        formatted = self._formatted(query_str)
        messages, remembered = self._split(formatted)
        if messages is None:
            return None
        # What is far too long need not be tokenized.
        if self.kvmem.engine.model.is_beyond_window(sum(map(len, texts))):
            return None
        documents = [Document(f"text-{number}", text, {}, (text,), heading="") for number, text in enumerate(texts)]
        try:
            prompt = self.kvmem.engine.build_prompt(
                messages,
                context=[*documents, *remembered],
                search=query_str,
                max_tokens=self.kvmem.max_new_tokens,
                chat_template_kwargs=self.kvmem.chat_template_kwargs,
            )
        except PromptTooLongError:
            return None
        return prompt if prompt.plan.mode == "whole" and not prompt.plan.dropped else None

    def _formatted(self, query_str: str) -> list[ChatMessage]:
        given = self._text_qa_template.partial_format(query_str=query_str)
        return self.kvmem._get_messages(given, context_str=_MARK)

    def _split(self, formatted: list[ChatMessage]) -> tuple[list[dict[str, Any]] | None, list[Document]]:
        spoken, remembered = without_memories(formatted)
        messages = [to_message(message) for message in spoken]
        if "".join(_text(message) for message in messages).count(_MARK) != 1:
            return None, remembered
        for message in messages:
            before, found, after = _text(message).partition(_MARK)
            if found:
                message["content"] = [before, CONTEXT, *([after] if after else [])]
        return messages, remembered

    # Answers

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        prev_response: RESPONSE_TEXT_TYPE | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        _LAST.set(None)
        texts = [text for text in text_chunks if text.strip()]
        prompt = self.build(query_str, texts) if texts and prev_response is None and not response_kwargs else None
        if prompt is None:
            return super().get_response(query_str, text_chunks, prev_response, **response_kwargs)
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(texts)))
        template, context = self._text_qa_template.partial_format(query_str=query_str), "\n\n".join(texts)
        response: RESPONSE_TEXT_TYPE
        with self._prepared(prompt, context, query_str):
            if self._streaming:
                response = self._llm.stream(template, context_str=context)
            else:
                response = self._llm.predict(template, context_str=context) or self._empty_response
        dispatcher.event(GetResponseEndEvent())
        return response

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        prev_response: RESPONSE_TEXT_TYPE | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        _LAST.set(None)
        texts = [text for text in text_chunks if text.strip()]
        prompt = None
        if texts and prev_response is None and not response_kwargs:
            prompt = await asyncio.to_thread(self.build, query_str, texts)
        if prompt is None:
            return await super().aget_response(query_str, text_chunks, prev_response, **response_kwargs)
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(texts)))
        template, context = self._text_qa_template.partial_format(query_str=query_str), "\n\n".join(texts)
        response: RESPONSE_TEXT_TYPE
        with self._prepared(prompt, context, query_str):
            if self._streaming:
                response = await self._llm.astream(template, context_str=context)
            else:
                response = await self._llm.apredict(template, context_str=context) or self._empty_response
        dispatcher.event(GetResponseEndEvent())
        return response

    @contextmanager
    def _prepared(self, prompt: Request, context: str, query_str: str) -> Iterator[None]:
        template = self._text_qa_template.partial_format(query_str=query_str)
        prepared = Prepared(self.kvmem, self.kvmem._get_messages(template, context_str=context), prompt)
        token = PREPARED.set(prepared)
        try:
            yield
        finally:
            PREPARED.reset(token)
        _LAST.set(prepared)

    def _prepare_response_output(
        self, response_str: RESPONSE_TEXT_TYPE | None, source_nodes: list[NodeWithScore]
    ) -> RESPONSE_TYPE:
        prepared = _LAST.get()
        _LAST.set(None)
        response = best_sources(super()._prepare_response_output(response_str, source_nodes), self.top_sources)
        if prepared is not None and prepared.stream is not None:
            told = {"plan": prepared.request.plan.as_dict()} if self._streaming else describe(prepared.stream.answer)
            response.metadata = {**(response.metadata or {}), **told}
            TOLD.set(told)
        return response


def best_sources(response: RESPONSE_TYPE, count: int | None) -> RESPONSE_TYPE:
    """The response with its `count` best source nodes; None for all, in the order of the prompt."""
    if count is not None:
        ranked = sorted(response.source_nodes, key=lambda found: -(found.score or 0.0))
        response.source_nodes = ranked[:count]
    return response


def _text(message: dict[str, Any]) -> str:
    return "".join(message["content"])
