"""Job: one answer under way. Its turn ends when the engine has let go of it, however the reply to the client ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvmem.answer import Answer
from kvmem.engine import KVMem
from kvmem.errors import AnswerTimeoutError, ClosedError
from kvmem.model import LanguageModel
from kvmem.serve.gate import Gate
from kvmem.serve.metrics import Metrics
from kvmem.serve.settings import ServeSettings
from kvmem.serve.tenants import Tenants
from kvmem.stream import AnswerStream

T = TypeVar("T")
# Seconds after its answer's end that a client may take to read the rest of it.
_GRACE = 60.0


class ClientLeftError(Exception):
    """Nobody reads the reply any more."""


class Desk:
    """Where requests wait for their turn, and are worked on.

    parallel: how many turns there are at a time; each may need a thread, and so may what needs no turn.
    """

    def __init__(self, tenants: Tenants, gate: Gate, metrics: Metrics, settings: ServeSettings, parallel: int) -> None:
        self.tenants, self.gate, self.metrics, self.settings = tenants, gate, metrics, settings
        self._pool = ThreadPoolExecutor(parallel + 4, thread_name_prefix="kvmem-serve")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def look(self, namespace: str, look: Callable[[KVMem], T]) -> T:
        """What needs no turn, since the model is not run."""

        def work() -> T:
            mem = self.tenants.take(namespace)
            try:
                return look(mem)
            finally:
                self.tenants.give_back(namespace)

        return await self.in_thread(work)

    async def work(self, namespace: str, work: Callable[[KVMem, Callable[[], bool]], T]) -> T:
        """Do `work` in a turn. It gets the engine, and what says that nobody waits for it any more."""
        deadline, left, entered = self._deadline(), asyncio.Event(), asyncio.Event()

        def over() -> bool:
            return left.is_set() or time.monotonic() > deadline or self.tenants.closed

        async def turn() -> T:
            await self._enter(namespace, deadline)
            entered.set()
            try:
                return await self.look(namespace, lambda mem: work(mem, over))
            except ClosedError:
                if time.monotonic() > deadline:
                    raise AnswerTimeoutError("It was not read in time. Send less at once.") from None
                raise
            finally:
                self.gate.leave()

        task = self.keep(turn())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            left.set()
            if not entered.is_set():
                task.cancel()
            raise

    async def begin(self, namespace: str, start: Callable[[KVMem, float], AnswerStream]) -> Job:
        """Begin an answer, when it is its turn. start: gets the engine and the seconds that are left.

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
        """A job's whole turn."""
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
                _ = job.begun.exception()  # there may be nobody left to look at it

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
            blendable = not isinstance(mem.model, LanguageModel) or mem.model.blendable
            self.metrics.ended(stream, blendable)
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
        """A task of a coroutine; an event loop keeps none by itself."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # What nobody waits for any more may fail.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def close(self) -> None:
        """Cancel what runs, and wait for its end."""
        self.tenants.close()


class Job:
    """An answer. deadline: `time.monotonic` seconds. begun: done once it has its turn and a stream, or has failed."""

    def __init__(self, namespace: str, start: Callable[[KVMem, float], AnswerStream], deadline: float) -> None:
        self.namespace, self.start, self.deadline = namespace, start, deadline
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.owner: asyncio.Task[None] | None = None
        self.stream: AnswerStream | None = None
        self.entered = self.left = False
        self._first: str | None = None

    async def first(self) -> None:
        """Wait for the first piece, or the end. Raises what the work does until then."""
        if self.stream is not None:
            self._first = await anext(self.stream, None)

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of the answer, that which `first` waited for included."""
        if self._first is not None and self.stream is not None:
            yield self._first
            async for piece in self.stream:
                yield piece

    async def answer(self) -> Answer:
        """The whole answer. Raises ClosedError when the server ended it."""
        found = None if self.stream is None else await self.stream.wait()
        if found is None or found.finish_reason == "cancelled":
            raise ClosedError("The answer was ended before its end. Ask again.")
        return found

    def close(self) -> None:
        """Nobody reads the answer any more: what is under way is cancelled. Nothing happens to one that is complete."""
        self.left = True
        if self.stream is not None:
            self.stream.close()
        elif not self.entered and self.owner is not None:
            self.owner.cancel()


class Events(StreamingResponse):
    """Server-sent events of a job, which is closed however the reply ends."""

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
    """What `work`, a coroutine, gives; it is cancelled when the client leaves. Raises ClientLeftError then."""

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
