"""Gate: admits requests round-robin across namespaces, first come, first served within a namespace."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class QueueFullError(Exception):
    """The request queue is full."""


class Gate:
    """Admits `parallel` requests at a time. Use it from one event loop only.

    queue: the maximum number of waiting requests. share: the maximum per namespace.
    """

    def __init__(self, parallel: int, queue: int, share: int) -> None:
        self._parallel, self._queue, self._share = parallel, queue, share
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def enter(self, namespace: str) -> None:
        """Wait until admitted; call `leave` when done. Raises QueueFullError."""
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
        """Free the slot and admit the next requests."""
        self.running -= 1
        while self._waiting and self.running < self._parallel:
            namespace, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            # Reinserted at the end, so every other namespace goes first.
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
