from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import Document, QueryBundle
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.tools import QueryEngineTool

from kvmem import KVMem
from llama_index_kvmem import KVMemQueryEngine

DOCUMENTS = [
    Document(text="The rent is due on the first day of the month.", metadata={"source": "lease"}, id_="l"),
    Document(text="The machine has two boilers.", metadata={"source": "manual"}, id_="m"),
]


@pytest.fixture
def engine(mem: KVMem) -> KVMemQueryEngine:
    return KVMemQueryEngine.from_documents(DOCUMENTS, mem, max_tokens=12)


def test_query_gives_a_response_with_its_sources(engine: KVMemQueryEngine) -> None:
    """A BaseQueryEngine whose Response names its nodes, their documents, and the plan."""
    assert isinstance(engine, BaseQueryEngine)
    response = engine.query("When is the rent due?")
    assert isinstance(response, Response)
    assert response.response == engine.mem.ask("When is the rent due?", max_tokens=12).text
    assert [n.node.ref_doc_id for n in response.source_nodes] == ["l", "m"]
    assert [n.metadata["source"] for n in response.source_nodes] == ["lease", "manual"]
    metadata: dict[str, Any] = response.metadata or {}
    assert metadata["plan"]["mode"] == "whole"
    assert metadata["usage"]["prompt"] == metadata["plan"]["prompt_tokens"]


async def test_async_and_streaming_give_the_same_text(mem: KVMem, engine: KVMemQueryEngine) -> None:
    """aquery, and both kinds of streams, agree with query."""
    expected = str(engine.query("When?"))
    assert str(await engine.aquery(QueryBundle("When?"))) == expected
    streaming = KVMemQueryEngine(mem, streaming=True, max_tokens=12)
    response = streaming.query("When?")
    assert isinstance(response, StreamingResponse)
    assert len(response.source_nodes) == 2
    assert "".join(response.response_gen) == expected
    async_response = await streaming.aquery("When?")
    assert isinstance(async_response, AsyncStreamingResponse)
    pieces = [piece async for piece in async_response.async_response_gen()]
    assert "".join(pieces) == expected


def test_query_events_fire_once(mem: KVMem) -> None:
    """Both the callback manager and the instrumentation see one query."""
    seen: list[str] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            seen.append(event.class_name())

    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(Handler())
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = KVMemQueryEngine.from_documents(DOCUMENTS, mem, callback_manager=CallbackManager([debug]))
    try:
        engine.query("When?")
    finally:
        dispatcher.event_handlers.pop()
    assert seen == ["QueryStartEvent", "QueryEndEvent"]
    assert len(debug.get_event_pairs(CBEventType.QUERY)) == 1


def test_it_serves_as_a_tool(engine: KVMemQueryEngine) -> None:
    """An agent's QueryEngineTool wraps it as any other engine."""
    tool = QueryEngineTool.from_defaults(engine, name="lease", description="about the lease")
    assert tool("When?").content == str(engine.query("When?"))
