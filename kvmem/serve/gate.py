"""Gate: whose turn it is. Namespaces take turns, and within one whoever came first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class QueueFullError(Exception):
    """As many requests wait as may."""


class Gate:
    """Lets `parallel` requests through at a time. For one event loop.

    queue: how many may wait in all, and share: of one namespace.
    """

    def __init__(self, parallel: int, queue: int, share: int) -> None:
        self._parallel, self._queue, self._share = parallel, queue, share
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def enter(self, namespace: str) -> None:
        """Wait for a turn; `leave` ends it. Raises QueueFullError."""
        if self.running < self._parallel and not self._waiting:
            self.running += 1
            return
        if self.waiting >= self._queue or len(self._waiting.get(namespace, ())) >= self._share:
            raise QueueFullError
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(namespace, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            else:
                self._drop(namespace, turn)
            raise

    def leave(self) -> None:
        """End a turn; the next begins."""
        self.running -= 1
        while self._waiting and self.running < self._parallel:
            namespace, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            # Its other requests wait until every other namespace has had a turn.
            del self._waiting[namespace]
            if turns:
                self._waiting[namespace] = turns
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _drop(self, namespace: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(namespace)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[namespace]
