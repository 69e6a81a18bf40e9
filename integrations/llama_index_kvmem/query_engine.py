"""KVMemQueryEngine: in the place of RetrieverQueryEngine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base import EventContext
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import BaseNode, QueryBundle

from kvmem import Answer, AnswerStream, KVMem, Plan
from llama_index_kvmem.convert import to_nodes


class KVMemQueryEngine(BaseQueryEngine):
    """Answers queries from documents read once.

    The response's `source_nodes` are the chunks in the prompt, and its `metadata` tells the plan, the usage and
    the timings (of a streamed response: the plan). With `streaming`, `query` gives a `StreamingResponse` and
    `aquery` an `AsyncStreamingResponse`.

    mem: the engine, with its documents. options: arguments of `KVMem.ask` for every query, such as `max_tokens`,
        `blend` or `system`.
    """

    def __init__(
        self,
        mem: KVMem,
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        super().__init__(callback_manager)
        self.mem = mem
        self.streaming = streaming
        self.options = options

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[BaseNode],
        model: str | KVMem = "smollm2",
        store: str | None = None,
        **options: Any,
    ) -> KVMemQueryEngine:
        """Read documents or nodes into an engine; those it has read before cost nothing."""
        mem = model if isinstance(model, KVMem) else KVMem(model, store)
        for document in documents:
            mem.add(document)
        return cls(mem, **options)

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            stream = self._open(query_bundle)
            response: RESPONSE_TYPE
            if self.streaming:
                metadata = {"plan": _plan(stream.plan)}
                response = StreamingResponse(_pieces(stream), to_nodes(stream.sources), metadata)
            else:
                response = _response(stream.answer)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            stream = self._open(query_bundle)
            response: RESPONSE_TYPE
            if self.streaming:
                sources = await stream.wait_for_sources()
                metadata = {"plan": _plan(stream.plan)}
                response = AsyncStreamingResponse(_apieces(stream), to_nodes(sources), metadata)
            else:
                response = _response(await stream.wait())
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _event(self, query_bundle: QueryBundle) -> AbstractContextManager[EventContext]:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        return self.callback_manager.event(CBEventType.QUERY, payload=payload)

    def _open(self, query_bundle: QueryBundle) -> AnswerStream:
        return self.mem.stream(query_bundle.query_str, **self.options)


def _pieces(stream: AnswerStream) -> Generator[str, None, None]:
    with stream:
        yield from stream


async def _apieces(stream: AnswerStream) -> AsyncGenerator[str, None]:
    with stream:
        async for piece in stream:
            yield piece


def _response(answer: Answer) -> Response:
    metadata = {
        "plan": _plan(answer.plan),
        "usage": {**vars(answer.usage), "prompt": answer.usage.prompt},
        "timings": dict(vars(answer.timings)),
        "finish_reason": answer.finish_reason,
    }
    return Response(answer.text, source_nodes=to_nodes(answer.sources), metadata=metadata)


def _plan(plan: Plan) -> dict[str, Any]:
    return {"mode": plan.mode, "reason": plan.reason, "prompt_tokens": plan.prompt_tokens, "over": plan.over}
