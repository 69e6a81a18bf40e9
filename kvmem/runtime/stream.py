"""AnswerStream: pieces of text as they are generated, then the whole answer."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from types import TracebackType

from kvmem.cancellation import Cancellation
from kvmem.errors import AnswerTimeoutError, ClosedError
from kvmem.parsing.parts import Part, TextPart
from kvmem.prompt.plan import Plan
from kvmem.results import Answer, Source
from kvmem.runtime.channel import Channel, PartListener


class AnswerStream:
    """An iterator of text pieces, also for `async for`. Work begins when it is created; closing it early cancels it.

    `parts` has thoughts and tool calls, too, while they are written. An answer can be read one way only, once.

    `plan` and `sources` wait until the prompt is decided; `answer` waits for the end. All three raise what the
    work raised.

    Args:
        cancellation: of the work. When its deadline passes, the work is cancelled, and waiting for it raises
            AnswerTimeoutError.
    """

    def __init__(self, executor: Executor, work: Callable[[PartListener], Answer], cancellation: Cancellation) -> None:
        self._channel = Channel()
        self._cancellation = cancellation
        self._future: Future[Answer] = executor.submit(work, self._channel)
        self._future.add_done_callback(self._channel.finish)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        return next(part.text for part in self.parts if isinstance(part, TextPart))

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        """The next piece, without blocking the event loop; leaving it closes the stream."""
        async for part in self.parts:
            if isinstance(part, TextPart):
                return part.text
        raise StopAsyncIteration

    @property
    def parts(self) -> AnswerParts:
        """The parts of the answer while they are written: text, thoughts and tool calls."""
        return AnswerParts(self)

    def next_part(self) -> Part | None:
        """The next part; None at the end."""
        with self._in_time():
            try:
                piece = self._channel.take(self._left())
            except queue.Empty:
                if not self._future.done():
                    raise
                piece = self._channel.take(None)  # the end is on its way
        if piece is None and not self._channel.closed:
            self._result()
        return piece

    async def next_part_async(self) -> Part | None:
        """Like `next_part`, without blocking the event loop; leaving it closes the stream."""
        try:
            with self._in_time():
                try:
                    piece = await self._channel.take_async(self._left())
                except TimeoutError:
                    if not self._future.done():
                        raise
                    piece = await self._channel.take_async(None)  # the end is on its way
        except asyncio.CancelledError:
            self.close()
            raise
        if piece is None and not self._channel.closed:
            await self.wait()
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
        return self._cancellation.remaining

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
                f"There was no answer within {self._cancellation.timeout:g} seconds. Raise timeout, or lower "
                "max_tokens."
            ) from None

    def close(self) -> None:
        """Stop generating. Pieces not yet taken are dropped; closing again does nothing."""
        self._channel.close()
        self._cancellation.cancel()
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


class AnswerParts:
    """An iterator of the parts of an answer, also for `async for`.

    Example:
        ```python
        for part in mem.stream_chat(messages, tools=tools).parts:
            print(part)
        ```
    """

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream

    def __iter__(self) -> AnswerParts:
        return self

    def __next__(self) -> Part:
        part = self._stream.next_part()
        if part is None:
            raise StopIteration
        return part

    def __aiter__(self) -> AnswerParts:
        return self

    async def __anext__(self) -> Part:
        part = await self._stream.next_part_async()
        if part is None:
            raise StopAsyncIteration
        return part
