"""Worker: the threads that an engine's prompts run in; one for a model in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

from kvmem.cancellation import Cancellation
from kvmem.errors import ClosedError, InputError
from kvmem.model.base import AnyModel
from kvmem.results import Answer
from kvmem.runtime.channel import PartListener
from kvmem.runtime.stream import AnswerStream

T = TypeVar("T")


class Turns:
    """Whose turn it is to use a model. owner: the thread that holds the lock, or 0."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner = 0


# Engines of one model share it.
_TURNS: WeakKeyDictionary[AnyModel, Turns] = WeakKeyDictionary()
_GUARD = threading.Lock()


def turns_of(model: AnyModel) -> Turns:
    """Shared by all engines of a model."""
    with _GUARD:
        return _TURNS.setdefault(model, Turns())


class Worker:
    """Runs one piece of work after the other; engines of one model take turns.

    A model that runs several prompts at a time has several threads, which take turns only where `turn` is open.
    """

    def __init__(self, model: AnyModel) -> None:
        self._model, self._parallel = model, model.parallel
        self._pid = os.getpid()
        self._turns = turns_of(model)
        self._executor = ThreadPoolExecutor(model.parallel, thread_name_prefix="kvmem")
        self._streams: WeakSet[AnswerStream] = WeakSet()
        # Whatever is submitted is either seen by `close`, or refused.
        self._opening = threading.RLock()
        self.closing = Cancellation()

    @property
    def closed(self) -> bool:
        return self.closing.cancelled

    def run(self, work: Callable[[], T]) -> T:
        """Wait for `work`, and return or raise what it does. Raises ClosedError when it was never begun."""

        def in_turn() -> T:
            with self.turn() if self._parallel == 1 else nullcontext():
                return work()

        self._check_process()
        with self._opening:
            self.check_open()
            future = self._executor.submit(in_turn)
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("This KVMem was closed before the work began. Open a new one.") from None

    def stream(
        self, work: Callable[[PartListener, Cancellation, T], Answer], timeout: float | None, prepare: Callable[[], T]
    ) -> AnswerStream:
        """Begin `work`; closing the worker cancels it.

        prepare: called before, in the same thread, while other engines of the model may run; its result is handed to
            `work`.
        """
        cancellation = Cancellation(timeout, self.closing)

        def in_turn(listener: PartListener) -> Answer:
            prepared = prepare()
            with self.turn() if self._parallel == 1 else nullcontext():
                return work(listener, cancellation, prepared)

        self._check_process()
        with self._opening:
            self.check_open()
            stream = AnswerStream(self._executor, in_turn, cancellation)
            self._streams.add(stream)
        return stream

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While open, no other thread uses the model, or changes what is known of it."""
        with self._turns.lock:
            before, self._turns.owner = self._turns.owner, threading.get_ident()
            try:
                self._model.refresh()
                yield
            finally:
                self._turns.owner = before

    def check_open(self) -> None:
        """Raise ClosedError, or InputError when called from inside running work."""
        self._check_process()
        if self.closed:
            raise ClosedError("This KVMem was closed. Open a new one on the same store.")
        if threading.get_ident() == self._turns.owner:
            raise InputError(
                "A KVMem was called from inside its own work, or that of another KVMem of the same model (by a "
                "retriever, or while iterating over context). Do it before the call, or use another model there."
            )

    def _check_process(self) -> None:
        """Raise ClosedError in a forked child, before anything waits for a lock that nobody there releases."""
        if os.getpid() != self._pid:
            raise ClosedError(
                "This KVMem was opened before the process was forked, and its threads do not exist in the child. "
                "Open a KVMem and its model in the child, for example in a post-fork hook."
            )

    def close(self) -> None:
        """Cancel what runs and what waits, and wait for its end."""
        if os.getpid() != self._pid:
            return
        with self._opening:
            self.closing.cancel()
            streams = tuple(self._streams)
        for stream in streams:
            stream.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
