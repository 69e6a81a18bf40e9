"""Sweeper: calls a function from time to time, in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from kvmem import KVMemError

logger = logging.getLogger("kvmem")


class Sweeper:
    """Removes what has expired, every so many seconds; failures of the store are logged, and do not end it."""

    def __init__(self, sweep: Callable[[], object]) -> None:
        self._sweep = sweep
        self._running: Future[None] | None = None
        self._stopping = threading.Event()

    def start(self, seconds: float) -> Future[None]:
        """Starting twice is once. The future ends with the thread."""
        if self._running is not None and not self._running.done():
            return self._running
        done: Future[None] = Future()
        self._stopping = stopping = threading.Event()

        def run() -> None:
            try:
                while not stopping.wait(seconds):
                    try:
                        self._sweep()
                    except KVMemError as error:
                        logger.warning("kvmem: expired items could not be removed: %s", error)
            except Exception as error:  # whatever the engine's own components raise
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=run, name="kvmem-ttl", daemon=True).start()
        self._running = done
        return done

    def stop(self, timeout: float | None = None) -> bool:
        """Whether it ended within `timeout` seconds."""
        self._stopping.set()
        if self._running is None:
            return True
        try:
            self._running.result(timeout)
        except TimeoutError:
            return False
        self._running = None
        return True
