"""AnswerStream: pieces of text as they are generated, then the whole answer."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from types import TracebackType
from typing import Protocol

from kvmem.answer import Answer, Source
from kvmem.errors import ClosedError
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


class AnswerStream:
    """An iterator of text pieces, also for `async for`. Work begins when it is created; closing it early cancels it.

    `plan` and `sources` wait until the prompt is decided; `answer` waits for the end. All three raise what the
    work raised.
    """

    def __init__(self, executor: Executor, work: Callable[[Listener], Answer]) -> None:
        self._channel = _Channel()
        self._future: Future[Answer] = executor.submit(work, self._channel)
        self._future.add_done_callback(self._channel.finish)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        piece = self._channel.take()
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
            piece = await self._channel.take_async()
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
            done, _ = await asyncio.wait([asyncio.wrap_future(self._future)])
        except asyncio.CancelledError:
            self.close()
            raise
        for future in done:
            _ = future.cancelled() or future.exception()  # looked at, or asyncio would complain; `_result` raises it
        return self._result()

    async def wait_for_sources(self) -> tuple[Source, ...]:
        """`sources`, without blocking the event loop."""
        decision = await asyncio.shield(asyncio.wrap_future(self._channel.decided))
        return (await self.wait()).sources if decision is None else decision[1]

    @property
    def plan(self) -> Plan:
        return self._decision()[0]

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._decision()[1]

    def _decision(self) -> tuple[Plan, tuple[Source, ...]]:
        decision = self._channel.decided.result()
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
            return self._future.result()
        except CancelledError:
            raise ClosedError("The question was cancelled before it was begun. Ask again.") from None

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

    def take(self) -> str | None:
        """The next piece, waiting for it; None at the end."""
        return None if self._ended else self._checked(self._pieces.get())

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
