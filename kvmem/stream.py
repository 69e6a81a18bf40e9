"""AnswerStream: pieces of text as they are generated, then the whole answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import TracebackType

from kvmem.answer import Answer

_END = object()


class AnswerStream:
    """An iterator of text pieces. Work begins when it is created; closing it early cancels the work.

    `answer` waits for the end and gives the whole answer.
    """

    def __init__(
        self, executor: Executor, work: Callable[[Callable[[str], None], threading.Event], Answer]
    ) -> None:
        self._pieces: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = False

        def run() -> Answer:
            try:
                return work(self._pieces.put, self._cancelled)
            finally:
                self._pieces.put(_END)

        self._future: Future[Answer] = executor.submit(run)
        self._future.add_done_callback(lambda _: self._pieces.put(_END))

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if not self._ended:
            piece = self._pieces.get()
            if piece is not _END:
                return str(piece)
            self._ended = True
        if not self._cancelled.is_set():
            self._future.result()
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for it. Raises what the work raised."""
        return self._future.result()

    def close(self) -> None:
        """Stop generating. Pieces not yet taken are dropped."""
        self._ended = True
        self._cancelled.set()
        self._future.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._future.done():
            self.close()
