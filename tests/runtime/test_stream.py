"""Streams of answers, as their readers see them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvmem.cancellation import Cancellation
from kvmem.errors import AnswerTimeoutError
from kvmem.results import Answer
from kvmem.runtime.stream import AnswerStream


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_an_answer_that_ended_in_time_is_read_later(clock: Clock) -> None:
    """All of it, however slow the reader: by iteration, async iteration, and waiting."""
    answer: Any = object()

    def work(listener: Any) -> Answer:
        for piece in "abc":
            listener.text(piece)
        return answer  # type: ignore[no-any-return]

    with ThreadPoolExecutor(1) as executor:
        for asynchronous in (False, True):
            stream = AnswerStream(executor, work, Cancellation(2, clock=clock))
            await stream.ended()
            clock.now += 100
            pieces = [piece async for piece in stream] if asynchronous else list(stream)
            assert pieces == ["a", "b", "c"]
            assert await stream.wait() is stream.answer is answer


async def test_an_answer_that_does_not_end_in_time_is_an_error(clock: Clock) -> None:
    """For whoever waits, sync or async."""
    release = threading.Event()

    def work(listener: Any) -> Answer:
        listener.text("a")
        release.wait()
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(2) as executor:
        streams = [AnswerStream(executor, work, Cancellation(2, clock=clock)) for _ in range(2)]
        assert next(streams[0]) == await anext(streams[1]) == "a"
        clock.now += 100
        with pytest.raises(AnswerTimeoutError):
            next(streams[0])
        with pytest.raises(AnswerTimeoutError):
            await anext(streams[1])
        release.set()
