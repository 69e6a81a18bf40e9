"""The HTTP routes: OpenAI's chat, completion and model endpoints, plus documents, threads, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from kvmem.engine import KVMem
from kvmem.model.base import AnyModel
from kvmem.parsing.parts import CallPart, TextPart
from kvmem.runtime.stream import AnswerStream
from kvmem.serve.faults import FaultBody, install, told
from kvmem.serve.gate import Gate
from kvmem.serve.guard import Guard
from kvmem.serve.job import Desk, Events, Job, while_connected
from kvmem.serve.metrics import Metrics
from kvmem.serve.reply import Kind, Reply, describe, event
from kvmem.serve.settings import ServeSettings
from kvmem.serve.tenants import Tenants
from kvmem.serve.wire import ChatRequest, CompletionRequest, DocumentRequest
from kvmem.settings import Settings
from kvmem.store.base import Store
from kvmem.text.document import as_document

_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultBody, "description": what}
    for status, what in {
        400: "The request is invalid.",
        401: "A valid API key is required.",
        403: "Access to this namespace or host is not allowed.",
        404: "The model, document or thread was not found.",
        408: "The request did not arrive in time.",
        413: "The request is too large.",
        429: "The request queue is full.",
        500: "Internal server error.",
        502: "The upstream vLLM server did not respond.",
        503: "The server is shutting down.",
        504: "The request timed out.",
    }.items()
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer as JSON, or as server-sent events.",
        "content": {"text/event-stream": {}, "application/json": {}},
    }
}
_Namespace = Query(default=None, min_length=1, max_length=200, description="The namespace (tenant).")


def create_app(
    model: AnyModel, store: Store, settings: Settings | None = None, limits: ServeSettings | None = None
) -> FastAPI:
    """Create a FastAPI application that serves `model` with `store`.

    The caller keeps ownership of `model` and `store` and must close both after the application has stopped.

    Args:
        model: The local model or vLLM model that answers.
        store: Where entries and records are kept.
        settings: Engine settings; None allows answers of up to a quarter of the model's window.
        limits: Server limits and API keys; None uses the defaults, without keys.

    Returns:
        The application. `app.state.close()` cancels all running requests.

    Example:
        ```python
        store = DiskStore("./kv-served")
        app = create_app(LanguageModel.load("smollm2"), store)
        uvicorn.run(app, host="127.0.0.1", port=8080)
        ```
    """
    limits = limits or ServeSettings()
    settings = settings or default_settings(model, limits)
    _ = model.fingerprint  # computed now, so that the first request does not wait for it
    gate = Gate(model.parallel, limits.queue, limits.share)
    tenants = Tenants(model, store, settings, limits.engines)
    desk = Desk(tenants, gate, Metrics(store, gate), limits, model.parallel)
    server = _Server(desk, model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.close)

    app = FastAPI(title="kvmem", description="An OpenAI-compatible API with cached documents.", lifespan=lifespan)
    # Lets the process that runs the app cancel requests in progress; their clients get an error.
    app.state.close = desk.close
    install(app)
    app.include_router(server.router())
    app.add_middleware(Guard, settings=limits, metrics=desk.metrics)
    return app


def default_settings(model: AnyModel, limits: ServeSettings) -> Settings:
    """Settings that let an answer use a quarter of the window by default; clients expect complete answers."""
    return Settings(max_tokens=longest_answer(model, limits))


def longest_answer(model: AnyModel, limits: ServeSettings) -> int:
    """The maximum answer length, in tokens, for requests that do not set one."""
    return max(1, min(limits.max_tokens, model.window // 4))


class _Server:
    """The route handlers."""

    def __init__(self, desk: Desk, model: AnyModel, settings: Settings) -> None:
        self._desk, self._model, self._settings = desk, model, settings

    def router(self) -> APIRouter:
        router = APIRouter(responses=_FAULTS)
        router.get("/health")(self.health)
        router.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{name:path}")(self.one_model)
        router.post("/v1/chat/completions", responses=_STREAMED)(self.chat)
        router.post("/v1/completions", responses=_STREAMED)(self.complete)
        router.post("/v1/documents", status_code=201)(self.add_document)
        router.get("/v1/documents")(self.list_documents)
        router.get("/v1/documents/{id:path}")(self.get_document)
        router.delete("/v1/documents/{id:path}")(self.remove_document)
        router.get("/v1/threads")(self.list_threads)
        router.get("/v1/threads/{id:path}")(self.get_thread)
        router.delete("/v1/threads/{id:path}")(self.remove_thread)
        return router

    async def health(self) -> dict[str, Any]:
        """Report that the server accepts requests, and how many are running and waiting."""
        return {"status": "ok", "running": self._desk.gate.running, "waiting": self._desk.gate.waiting}

    async def metrics(self) -> Response:
        """Return metrics in Prometheus format."""
        text = await self._desk.in_thread(self._desk.metrics.text)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """Return the model with this name."""
        self._check_model(name)
        return self._card()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        self._check_model(body.model)
        namespace = self._namespace(request, body.kvmem.namespace)
        messages = [message.plain() for message in body.messages]
        options = body.options(self._desk.settings.max_tokens)

        def start(mem: KVMem, seconds: float) -> AnswerStream:
            return mem.stream_chat(messages, context=body.kvmem.texts(mem), timeout=seconds, **options)

        return await self._reply(request, "chat.completion", namespace, start, body)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Complete a text. The text is the entire prompt."""
        self._check_model(body.model)
        namespace = self._namespace(request, body.kvmem.namespace)
        prompt, options = body.one_prompt(), body.sampling(self._desk.settings.max_tokens)

        def start(mem: KVMem, seconds: float) -> AnswerStream:
            return mem.stream_complete(prompt, blend=body.kvmem.blend, timeout=seconds, **options)

        return await self._reply(request, "text_completion", namespace, start, body)

    async def _reply(
        self,
        request: Request,
        kind: Kind,
        namespace: str,
        start: Callable[[KVMem, float], AnswerStream],
        body: ChatRequest | CompletionRequest,
    ) -> Response:
        reply = Reply(kind, self._model.name, self._model.fingerprint)

        async def begin() -> Job:
            job = await self._desk.begin(namespace, start)
            try:
                # An error before the first token gets its own HTTP status, even when streaming.
                await job.first()
            except BaseException:
                job.close()
                raise
            return job

        async def whole() -> Response:
            job = await self._desk.begin(namespace, start)
            try:
                return JSONResponse(reply.whole(await job.answer()))
            finally:
                job.close()

        if not body.stream:
            answered: Response = await while_connected(request, whole())
            return answered
        job: Job = await while_connected(request, begin())
        return Events(job, _events(job, reply, body.wants_usage))

    async def add_document(self, body: DocumentRequest, request: Request) -> dict[str, Any]:
        """Add a document. A document with the same id is replaced, and only the changed parts are read."""
        namespace = self._namespace(request, body.namespace)
        document = as_document(body.text, body.id, body.metadata)
        added = self._desk.work(namespace, lambda mem, stop: mem.add(document, cancellation=stop))
        return describe(await while_connected(request, added))

    async def list_documents(self, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:
        """List all documents in the order they were added."""
        found = await self._desk.look(self._namespace(request, namespace), lambda mem: mem.list())
        return {"object": "list", "data": [describe(document) for document in found]}

    async def get_document(self, id: str, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:  # noqa: A002
        """Return a document with its text."""
        document = await self._desk.look(self._namespace(request, namespace), lambda mem: mem.get(id))
        return describe(document, text=True)

    async def remove_document(self, id: str, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:  # noqa: A002
        """Remove a document and all entries of text that no other document contains."""
        await self._desk.work(self._namespace(request, namespace), lambda mem, _: mem.remove(id))
        return {"object": "document", "id": id, "deleted": True}

    async def list_threads(self, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:
        """List the names of all threads."""
        found = await self._desk.look(self._namespace(request, namespace), lambda mem: mem.threads())
        return {"object": "list", "data": [{"object": "thread", "id": name} for name in found]}

    async def get_thread(self, id: str, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:  # noqa: A002
        """Return the messages of a thread, including the last answer."""
        messages = await self._desk.look(self._namespace(request, namespace), lambda mem: mem.history(id))
        return {"object": "thread", "id": id, "messages": list(messages)}

    async def remove_thread(self, id: str, request: Request, namespace: str | None = _Namespace) -> dict[str, Any]:  # noqa: A002
        """Remove a thread and its entries."""
        await self._desk.work(self._namespace(request, namespace), lambda mem, _: mem.forget_thread(id))
        return {"object": "thread", "id": id, "deleted": True}

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": 0,
            "owned_by": "kvmem",
            "max_model_len": self._model.window,
        }

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            message = f"There is no model {name[:200]!r} on this server. Use {self._model.name!r}."
            raise HTTPException(404, message)

    def _namespace(self, request: Request, wanted: str | None) -> str:
        own: str | None = request.state.namespace
        if own is not None and wanted not in (None, own):
            raise HTTPException(
                403, "This API key belongs to a different namespace. Omit the namespace from the request."
            )
        return own or wanted or self._settings.namespace


async def _events(job: Job, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Yield the answer as server-sent events."""
    try:
        if reply.kind == "chat.completion":
            yield event(reply.role())
        begun: set[str] = set()
        async for part in job.parts():
            begun |= {part.id} if isinstance(part, CallPart) else set()
            yield event(reply.part(part))
        answer = await job.answer()
        for call in answer.invalid_calls:
            if call.id not in begun:
                yield event(reply.part(TextPart(call.text)))
        yield event(reply.end(answer))
        if with_usage:
            yield event(reply.usage(answer))
        yield event("[DONE]")
    except Exception as error:
        yield event(told(error)[1])
