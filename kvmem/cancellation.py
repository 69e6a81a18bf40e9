"""Cancellation: a flag and a deadline, passed down to everything that may have to stop early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmem.errors import AnswerTimeoutError, ClosedError, InputError


class Cancellation:
    """Says when work should stop: it was cancelled, its deadline has passed, or its parent says so. Thread-safe.

    Args:
        timeout: seconds from now until the deadline; None for no deadline.
        parent: stops this one as well.
        clock: monotonic seconds.

    Raises:
        InputError: if timeout is not a positive number.

    Example:
        ```python
        cancellation = Cancellation(timeout=30.0)
        while not cancellation.stopped:
            work()
        ```
    """

    def __init__(
        self,
        timeout: float | None = None,
        parent: Cancellation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0):
            raise InputError(f"timeout must be a positive number of seconds, not {timeout!r}.")
        self.timeout, self._parent, self._clock = timeout, parent, clock
        self._deadline = None if timeout is None else clock() + timeout
        self._cancelled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Stop the work. Calling it again does nothing."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        return self._cancelled or (self._parent is not None and self._parent.cancelled)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        late = self._deadline is not None and self._clock() >= self._deadline
        return late or (self._parent is not None and self._parent.expired)

    @property
    def stopped(self) -> bool:
        return self.cancelled or self.expired

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, 0 after it; None without one."""
        own = None if self._deadline is None else max(0.0, self._deadline - self._clock())
        above = None if self._parent is None else self._parent.remaining
        return min((seconds for seconds in (own, above) if seconds is not None), default=None)

    def check(self) -> None:
        """Raises ClosedError when the work was cancelled, AnswerTimeoutError when its deadline has passed."""
        if self.cancelled:
            raise ClosedError("The work was cancelled before it was done. Ask again.")
        if self.expired:
            raise AnswerTimeoutError(
                f"The work was not done within {self.timeout or 0:g} seconds. Raise timeout, or ask for less at once."
            )

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """While open, `callback` is called once when the work is cancelled, from the thread that cancels it.

        Deadlines call nothing: wait no longer than `remaining`.
        """
        chain: list[Cancellation] = [self]
        while (parent := chain[-1]._parent) is not None:
            chain.append(parent)
        for one in chain:
            one._add(callback)
        try:
            yield
        finally:
            for one in chain:
                one._discard(callback)

    def _add(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def _discard(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


class _Never(Cancellation):
    def cancel(self) -> None:
        raise AssertionError("NEVER is shared, and is not cancelled")


NEVER: Cancellation = _Never()
"""For work that always runs to its end."""
