"""AnswerStream: pieces of text as they are generated, then the whole answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
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
    """An iterator of text pieces. Work begins when it is created; closing it early cancels the work.

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

    @property
    def plan(self) -> Plan:
        return self._decision()[0]

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._decision()[1]

    def _decision(self) -> tuple[Plan, tuple[Source, ...]]:
        decision = self._channel.decision()
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
        self._planned = threading.Event()
        self._cancelled = threading.Event()
        self._decision: tuple[Plan, tuple[Source, ...]] | None = None
        self._ended = False

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        self._decision = plan, sources
        self._planned.set()

    def text(self, piece: str) -> None:
        self._pieces.put(piece)

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def finish(self, _: Future[Answer]) -> None:
        self._planned.set()
        self._pieces.put(_END)

    def cancel(self) -> None:
        self._cancelled.set()
        self._ended = True

    def decision(self) -> tuple[Plan, tuple[Source, ...]] | None:
        self._planned.wait()
        return self._decision

    def take(self) -> str | None:
        """The next piece, waiting for it; None at the end."""
        if self._ended:
            return None
        piece = self._pieces.get()
        if piece is _END:
            self._ended = True
            return None
        return str(piece)
