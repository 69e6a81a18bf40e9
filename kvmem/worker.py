"""Worker: the threads that an engine's prompts run in; one for a model in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakSet

from kvmem.answer import Answer
from kvmem.any_model import AnyModel
from kvmem.errors import ClosedError, InputError
from kvmem.stream import AnswerStream, Listener

T = TypeVar("T")


class Worker:
    """Runs one piece of work after the other; engines of one model take turns. A model that runs several prompts at a
    time has several threads, which take turns only where `turn` is open."""

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._executor = ThreadPoolExecutor(model.parallel, thread_name_prefix="kvmem")
        self._streams: WeakSet[AnswerStream] = WeakSet()
        # Whatever is submitted is either seen by `close`, or refused.
        self._opening = threading.RLock()
        self.closed = False

    def run(self, work: Callable[[], T]) -> T:
        """Wait for `work`, and return or raise what it does. Raises ClosedError when it was never begun."""

        def turn() -> T:
            with self.turn() if self._model.parallel == 1 else nullcontext():
                return work()

        with self._opening:
            self.check_open()
            future = self._executor.submit(turn)
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("This KVMem was closed before the work was begun. Open a new one.") from None

    def read(self, work: Callable[[], T], cancelled: Callable[[], bool] | None = None) -> T:
        """Like `run`, for work that may end halfway, by a ClosedError: once `cancelled` is true, or this is closed."""

        def reading() -> T:
            with self._model.giving_up(lambda: self.closed or (cancelled is not None and cancelled())):
                return work()

        return self.run(reading)

    def stream(
        self, work: Callable[[Listener, T], Answer], timeout: float | None, prepare: Callable[[], T]
    ) -> AnswerStream:
        """Begin `work`; closing the worker cancels it. prepare: called before, in the same thread, while other engines
        of the model may run; its result is handed to `work`."""

        def turn(listener: Listener) -> Answer:
            prepared = prepare()
            with self.turn() if self._model.parallel == 1 else nullcontext():
                return work(listener, prepared)

        with self._opening:
            self.check_open()
            stream = AnswerStream(self._executor, turn, timeout)
            self._streams.add(stream)
        return stream

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While open, no other thread uses the model, or changes what is known of it."""
        with self._model.lock:
            before, self._model.working = self._model.working, threading.get_ident()
            try:
                yield
            finally:
                self._model.working = before

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
        with self._opening:
            self.closed = True
            streams = tuple(self._streams)
        for stream in streams:
            stream.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
