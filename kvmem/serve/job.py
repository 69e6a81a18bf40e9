"""Job: one answer in progress. It holds its slot until the engine has finished, however the response ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvmem.cancellation import Cancellation
from kvmem.engine import KVMem
from kvmem.errors import ClosedError
from kvmem.parsing.parts import Part
from kvmem.results import Answer
from kvmem.runtime.stream import AnswerStream
from kvmem.serve.gate import Gate
from kvmem.serve.metrics import Metrics
from kvmem.serve.settings import ServeSettings
from kvmem.serve.tenants import Tenants

T = TypeVar("T")
# Extra seconds for a client to read the rest of a finished answer.
_GRACE = 60.0


class ClientLeftError(Exception):
    """The client disconnected."""


class Desk:
    """Queues requests and runs them.

    parallel: the number of slots. Each may need a thread, and so may work that needs no slot.
    """

    def __init__(self, tenants: Tenants, gate: Gate, metrics: Metrics, settings: ServeSettings, parallel: int) -> None:
        self.tenants, self.gate, self.metrics, self.settings = tenants, gate, metrics, settings
        self._pool = ThreadPoolExecutor(parallel + 4, thread_name_prefix="kvmem-serve")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def look(self, namespace: str, look: Callable[[KVMem], T]) -> T:
        """Run `look` without a slot; it must not run the model."""

        def work() -> T:
            mem = self.tenants.take(namespace)
            try:
                return look(mem)
            finally:
                self.tenants.give_back(namespace)

        return await self.in_thread(work)

    async def work(self, namespace: str, work: Callable[[KVMem, Cancellation], T]) -> T:
        """Do `work` in a turn. It gets the engine, and a cancellation for when the client disconnects."""
        deadline, entered = self._deadline(), asyncio.Event()
        cancellation = Cancellation(self.settings.timeout)

        async def turn() -> T:
            await self._enter(namespace, deadline)
            entered.set()
            try:
                return await self.look(namespace, lambda mem: work(mem, cancellation))
            finally:
                self.gate.leave()

        task = self.keep(turn())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            cancellation.cancel()
            if not entered.is_set():
                task.cancel()
            raise

    async def begin(self, namespace: str, start: Callable[[KVMem, float], AnswerStream]) -> Job:
        """Start an answer as soon as a slot is free. start: gets the engine and the remaining seconds.

        Raises TimeoutError, QueueFullError, KVMemError.
        """
        job = Job(namespace, start, self._deadline())
        job.owner = self.keep(self._own(job))
        try:
            await asyncio.shield(job.begun)
        except BaseException:
            job.close()
            raise
        return job

    async def _own(self, job: Job) -> None:
        """Wait for a slot, run the job, and free the slot."""
        try:
            await self._enter(job.namespace, job.deadline)
            job.entered = True
            try:
                await self._run(job)
            finally:
                self.gate.leave()
        except BaseException as error:
            if not job.begun.done():
                job.begun.set_exception(error)
                _ = job.begun.exception()  # marks it as retrieved; the waiter may be gone

    async def _run(self, job: Job) -> None:
        mem = await self.in_thread(lambda: self.tenants.take(job.namespace))
        try:
            stream = await self.in_thread(lambda: job.start(mem, max(0.001, job.deadline - time.monotonic())))
            job.stream = stream
            if job.left:
                stream.close()
            if not job.begun.done():
                job.begun.set_result(None)
            await stream.ended()
            self.metrics.ended(stream, mem.limitation is None)
        finally:
            await self.in_thread(lambda: self.tenants.give_back(job.namespace))

    async def _enter(self, namespace: str, deadline: float) -> None:
        began = time.monotonic()
        async with asyncio.timeout(deadline - began):
            await self.gate.enter(namespace)
        self.metrics.waited(time.monotonic() - began)

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.timeout

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def keep(self, work: Any) -> asyncio.Task[Any]:
        """Start a task and keep a reference to it; event loops hold only weak ones."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Retrieve the exception, so that asyncio does not warn about it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def close(self) -> None:
        """Cancel all running work and wait for it to end."""
        self.tenants.close()


class Job:
    """One answer. deadline: `time.monotonic()` seconds. begun: done once it has a slot and a stream, or has failed."""

    def __init__(self, namespace: str, start: Callable[[KVMem, float], AnswerStream], deadline: float) -> None:
        self.namespace, self.start, self.deadline = namespace, start, deadline
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.owner: asyncio.Task[None] | None = None
        self.stream: AnswerStream | None = None
        self.entered = self.left = False
        self._first: Part | None = None

    async def first(self) -> None:
        """Wait for the first part or the end. Raises any error that occurs before it."""
        if self.stream is not None:
            self._first = await anext(self.stream.parts, None)

    async def parts(self) -> AsyncIterator[Part]:
        """Yield the parts of the answer, including the one that `first` waited for."""
        if self._first is not None and self.stream is not None:
            yield self._first
            async for part in self.stream.parts:
                yield part

    async def answer(self) -> Answer:
        """Wait for the whole answer. Raises ClosedError if it was cancelled."""
        found = None if self.stream is None else await self.stream.wait()
        if found is None or found.finish_reason == "cancelled":
            raise ClosedError("The answer was cancelled before it was complete. Try again.")
        return found

    def close(self) -> None:
        """Cancel the answer if it is not complete."""
        self.left = True
        if self.stream is not None:
            self.stream.close()
        elif not self.entered and self.owner is not None:
            self.owner.cancel()


class Events(StreamingResponse):
    """Streams a job as server-sent events and closes the job when the response ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._job.deadline - time.monotonic() + _GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def while_connected(request: Request, work: Any) -> Any:
    """Await `work`; cancel it and raise ClientLeftError if the client disconnects."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for pending in (task, left):
            pending.cancel()
        await asyncio.gather(task, left, return_exceptions=True)
