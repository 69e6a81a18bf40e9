"""AnswerStream: pieces of text as they are generated, then the whole answer."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol

from kvmem.answer import Answer, Source
from kvmem.any_model import AnyModel
from kvmem.errors import AnswerTimeoutError, ClosedError
from kvmem.plan import Plan

_END = object()


class Listener(Protocol):
    """What the engine tells while it works on a question."""

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        """The prompt is decided; called once, before any text."""

    def text(self, piece: str) -> None:
        """The next piece of the answer."""

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class Deadline:
    """A listener that nobody reads, and whose answers have to be there in time.

    seconds: from now, or None. closed: asked as well; once it is true, nobody waits any more.
    """

    def __init__(self, seconds: float | None, closed: Callable[[], bool] = lambda: False) -> None:
        self._until = None if seconds is None else time.monotonic() + seconds
        self._closed = closed

    def check(self) -> None:
        """Raises AnswerTimeoutError or ClosedError when it is over."""
        if self._is_late():
            raise AnswerTimeoutError("The answers were not there in time. Give more time, or ask less at once.")
        if self._closed():
            raise ClosedError("This KVMem was closed before the answers were there. Open a new one.")

    @contextmanager
    def limiting(self, model: AnyModel) -> Iterator[None]:
        """While open, work of this thread ends when it is over. Raises AnswerTimeoutError, ClosedError."""
        try:
            with model.giving_up(self.cancelled):
                yield
        except ClosedError:
            self.check()
            raise

    def _is_late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        pass

    def text(self, piece: str) -> None:
        pass

    def cancelled(self) -> bool:
        return self._is_late() or self._closed()


class AnswerStream:
    """An iterator of text pieces, also for `async for`. Work begins when it is created; closing it early cancels it.

    `plan` and `sources` wait until the prompt is decided; `answer` waits for the end. All three raise what the
    work raised.

    timeout: seconds from now until the end of the answer; then it is cancelled, and whoever waits gets
        AnswerTimeoutError.
    """

    def __init__(self, executor: Executor, work: Callable[[Listener], Answer], timeout: float | None = None) -> None:
        self._channel = _Channel()
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._future: Future[Answer] = executor.submit(work, self._channel)
        self._future.add_done_callback(self._channel.finish)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        with self._in_time():
            piece = self._channel.take(self._left())
        if piece is None:
            if not self._channel.cancelled():
                self._result()
            raise StopIteration
        return piece

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        """The next piece, without blocking the event loop; leaving it closes the stream."""
        try:
            with self._in_time():
                piece = await asyncio.wait_for(self._channel.take_async(), self._left())
        except asyncio.CancelledError:
            self.close()
            raise
        if piece is None:
            if not self._channel.cancelled():
                await self.wait()
            raise StopAsyncIteration
        return piece

    async def wait(self) -> Answer:
        """The whole answer, without blocking the event loop; leaving it closes the stream."""
        try:
            await asyncio.wait([self._watched()], timeout=self._left())
        except asyncio.CancelledError:
            self.close()
            raise
        return self._result()

    async def ended(self) -> None:
        """Wait until nothing is done for it any more, whatever came of it; leaving does not close it."""
        await asyncio.wait([self._watched()])

    def _watched(self) -> asyncio.Future[Answer]:
        """The work, for an event loop, which complains of exceptions that nobody looked at."""
        future = asyncio.wrap_future(self._future)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    async def wait_for_sources(self) -> tuple[Source, ...]:
        """`sources`, without blocking the event loop."""
        decided = asyncio.shield(asyncio.wrap_future(self._channel.decided))
        with self._in_time():
            decision = await asyncio.wait_for(decided, self._left())
        return (await self.wait()).sources if decision is None else decision[1]

    @property
    def plan(self) -> Plan:
        return self._decision()[0]

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._decision()[1]

    def _decision(self) -> tuple[Plan, tuple[Source, ...]]:
        with self._in_time():
            decision = self._channel.decided.result(self._left())
        if decision is None:
            answer = self._result()
            return answer.plan, answer.sources
        return decision

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for it. Raises ClosedError when it was cancelled before it was begun."""
        return self._result()

    def _result(self) -> Answer:
        try:
            with self._in_time():
                return self._future.result(self._left())
        except CancelledError:
            raise ClosedError("The question was cancelled before it was begun. Ask again.") from None

    def _left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Turn running out of time into AnswerTimeoutError; other time-outs (of a retriever, say) are passed on."""
        try:
            yield
        except (TimeoutError, queue.Empty):
            if self._left() != 0 or self._future.done():
                raise
            self.close()
            raise AnswerTimeoutError(
                f"There was no answer within {self._timeout} seconds. Give more time, or lower max_tokens."
            ) from None

    def close(self) -> None:
        """Stop generating. Pieces not yet taken are dropped; closing again does nothing."""
        self._channel.cancel()
        self._future.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_future") and not self._future.done():
            self.close()


class _Channel:
    """From the engine's thread to the caller's. It knows nothing of the stream, so that an abandoned stream is
    collected, and thereby cancelled."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = False
        self._wake: Callable[[], None] | None = None
        self.decided: Future[tuple[Plan, tuple[Source, ...]] | None] = Future()

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        self.decided.set_result((plan, sources))

    def text(self, piece: str) -> None:
        self._put(piece)

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def finish(self, _: Future[Answer]) -> None:
        if not self.decided.done():
            self.decided.set_result(None)
        self._put(_END)

    def _put(self, item: object) -> None:
        self._pieces.put(item)
        wake = self._wake
        if wake is not None:
            wake()

    def cancel(self) -> None:
        self._cancelled.set()
        self._ended = True

    def take(self, timeout: float | None) -> str | None:
        """The next piece, waiting for it; None at the end. Raises queue.Empty after `timeout` seconds."""
        return None if self._ended else self._checked(self._pieces.get(timeout=timeout))

    async def take_async(self) -> str | None:
        """Like `take`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def wake() -> None:
            # The loop may be gone by the time the engine has something to say.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        while not self._ended:
            try:
                return self._checked(self._pieces.get_nowait())
            except queue.Empty:
                await arrived.wait()
                arrived.clear()
        return None

    def _checked(self, piece: object) -> str | None:
        if piece is _END:
            self._ended = True
            return None
        return str(piece)
