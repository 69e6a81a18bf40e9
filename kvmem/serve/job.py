"""Job: one answer under way, from its turn to its end, whoever ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvmem.answer import Answer
from kvmem.engine import KVMem
from kvmem.errors import ClosedError
from kvmem.model import LanguageModel
from kvmem.serve.gate import Gate
from kvmem.serve.metrics import Metrics
from kvmem.serve.settings import ServeSettings
from kvmem.serve.tenants import Tenants
from kvmem.stream import AnswerStream

T = TypeVar("T")


@dataclass(eq=False)
class Desk:
    """Where requests wait for their turn, and are worked on."""

    tenants: Tenants
    gate: Gate
    metrics: Metrics
    settings: ServeSettings
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    async def take(self, namespace: str, deadline: float) -> KVMem:
        """Wait for a turn; `leave` ends it. deadline: `time.monotonic` seconds. Raises TimeoutError, QueueFullError,
        KVMemError."""
        began = time.monotonic()
        async with asyncio.timeout(deadline - began):
            await self.gate.enter(namespace)
        self.metrics.waited(time.monotonic() - began)
        try:
            return await asyncio.to_thread(self.tenants.take, namespace)
        except BaseException:
            self.gate.leave()
            raise

    def leave(self, namespace: str) -> None:
        self.tenants.give_back(namespace)
        self.gate.leave()

    async def work(self, namespace: str, work: Callable[[KVMem], T]) -> T:
        """Do `work` in a turn; it is done to its end, even if nobody waits for that any more."""

        async def whole() -> T:
            mem = await self.take(namespace, time.monotonic() + self.settings.timeout)
            try:
                return await asyncio.to_thread(work, mem)
            finally:
                self.leave(namespace)

        return await asyncio.shield(self._keep(asyncio.create_task(whole())))

    async def begin(self, namespace: str, start: Callable[[KVMem, float], AnswerStream]) -> Job:
        """Begin an answer. start: gets the engine and the seconds that are left."""
        deadline = time.monotonic() + self.settings.timeout
        mem = await self.take(namespace, deadline)
        try:
            stream = await asyncio.to_thread(start, mem, max(0.001, deadline - time.monotonic()))
        except BaseException:
            self.leave(namespace)
            raise
        return Job(self, namespace, mem, stream)

    def close_later(self, job: Job) -> None:
        """Cancel the job, and end its turn when it has let go."""
        self._keep(asyncio.create_task(self._end(job)))

    async def _end(self, job: Job) -> None:
        job.stream.close()
        await job.stream.ended()
        self.leave(job.namespace)

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """An event loop keeps no task by itself."""
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task


@dataclass(eq=False)
class Job:
    """An answer that has its turn until `close`."""

    desk: Desk
    namespace: str
    mem: KVMem
    stream: AnswerStream
    _first: str | None = None
    _answered: bool = False
    _closed: bool = False

    async def begin(self) -> None:
        """Wait for the first piece, or the end. Raises what the work does until then."""
        self._first = await anext(self.stream, None)

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of the answer, that which `begin` waited for included."""
        if self._first is not None:
            yield self._first
            async for piece in self.stream:
                yield piece

    async def answer(self) -> Answer:
        """The whole answer, counted."""
        found = await self.stream.wait()
        self._answered = True
        blendable = not isinstance(self.mem.model, LanguageModel) or self.mem.model.blendable
        self.desk.metrics.answered(found, blendable)
        return found

    def close(self) -> None:
        """Give the turn back; what is under way is cancelled. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if not self._answered:
            self.desk.metrics.cancelled()
        self.desk.close_later(self)


class Events(StreamingResponse):
    """Server-sent events of a job, which is closed however the reply ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def while_connected(request: Request, work: Any) -> Any:
    """What `work`, a coroutine, gives; it is cancelled when the client leaves. Raises ClosedError then."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClosedError("The client left. Ask again.")
    finally:
        for pending in (task, left):
            pending.cancel()
        await asyncio.gather(task, left, return_exceptions=True)
