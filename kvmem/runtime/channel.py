"""Channel: carries an answer from the engine's thread to the caller's."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol

from kvmem.parsing.parts import Part, TextPart
from kvmem.prompt.plan import Plan
from kvmem.results import Answer, Source


class Listener(Protocol):
    """What the engine reports while it works on a question."""

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        """The prompt is decided; called once, before any text."""

    def text(self, piece: str) -> None:
        """The next piece of the answer, as the model writes it."""


class PartListener(Listener, Protocol):
    """A listener that can tell thoughts and calls from text."""

    def part(self, part: Part) -> None:
        """The next part of the answer."""


class Silent:
    """A listener that discards everything."""

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        pass

    def text(self, piece: str) -> None:
        pass


class Channel:
    """From the engine's thread to the caller's. It knows nothing of the stream, so that an abandoned stream is
    collected, and thereby cancelled."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self.closed = False
        self._ended = False
        self._wake: Callable[[], None] | None = None
        self.decided: Future[tuple[Plan, tuple[Source, ...]] | None] = Future()

    def planned(self, plan: Plan, sources: tuple[Source, ...]) -> None:
        self.decided.set_result((plan, sources))

    def text(self, piece: str) -> None:
        self._put(TextPart(piece))

    def part(self, part: Part) -> None:
        self._put(part)

    def finish(self, _: Future[Answer]) -> None:
        if not self.decided.done():
            self.decided.set_result(None)
        self._put(None)

    def _put(self, item: Part | None) -> None:
        self._pieces.put(item)
        wake = self._wake
        if wake is not None:
            wake()

    def close(self) -> None:
        self.closed = self._ended = True

    def take(self, timeout: float | None) -> Part | None:
        """The next part, waiting for it; None at the end. Raises queue.Empty after `timeout` seconds."""
        if self._ended:
            return None
        try:
            # What is there is taken, however late.
            return self._checked(self._pieces.get_nowait())
        except queue.Empty:
            return self._checked(self._pieces.get(timeout=timeout))

    async def take_async(self, timeout: float | None) -> Part | None:
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
                async with asyncio.timeout(timeout):
                    await arrived.wait()
                arrived.clear()
        return None

    def _checked(self, item: Part | None) -> Part | None:
        self._ended = self._ended or item is None
        return item
