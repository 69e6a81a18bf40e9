"""Worker: the one thread that an engine's model runs in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

from kvmem.answer import Answer
from kvmem.errors import ClosedError, InputError
from kvmem.model import LanguageModel
from kvmem.stream import AnswerStream, Listener

T = TypeVar("T")


class Worker:
    """Runs one piece of work after the other; engines of one model take turns."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvmem")
        self._streams: WeakSet[AnswerStream] = WeakSet()
        self.closed = False

    def run(self, work: Callable[[], T]) -> T:
        """Wait for `work`, and return or raise what it does."""
        self.check_open()

        def turn() -> T:
            with self._turn():
                return work()

        return self._executor.submit(turn).result()

    def stream(
        self, work: Callable[[Listener, T], Answer], timeout: float | None, prepare: Callable[[], T]
    ) -> AnswerStream:
        """Begin `work`; closing the worker cancels it. prepare: called before, in the same thread, while other engines
        of the model may run; its result is handed to `work`."""
        self.check_open()

        def turn(listener: Listener) -> Answer:
            prepared = prepare()
            with self._turn():
                return work(listener, prepared)

        stream = AnswerStream(self._executor, turn, timeout)
        self._streams.add(stream)
        return stream

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._model.lock:
            self._model.working = threading.get_ident()
            try:
                yield
            finally:
                self._model.working = 0

    def check_open(self) -> None:
        """Raise ClosedError, or InputError when called from work that is being done."""
        if self.closed:
            raise ClosedError("This KVMem was closed. Open a new one on the same store.")
        if threading.get_ident() == self._model.working:
            raise InputError(
                "A KVMem was called from inside its own work, or that of another with the same model (by a retriever, "
                "or while iterating context). Use one with a model of its own there, or do it before the call."
            )

    def close(self) -> None:
        """Cancel what runs and what waits, and wait for its end."""
        self.closed = True
        for stream in tuple(self._streams):
            stream.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
