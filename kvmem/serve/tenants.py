"""Tenants: one engine per namespace, sharing one model and one store."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict

from kvmem.engine import KVMem
from kvmem.errors import ClosedError
from kvmem.model.base import AnyModel
from kvmem.settings import Settings
from kvmem.store.base import Store


class Tenants:
    """Opens engines on demand and closes the least recently used idle ones above `limit`."""

    def __init__(self, model: AnyModel, store: Store, settings: Settings, limit: int) -> None:
        self._model, self._store, self._settings, self._limit = model, store, settings, limit
        self._open: OrderedDict[str, KVMem] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.closed = False

    def take(self, namespace: str) -> KVMem:
        """The engine of a namespace; it stays open until `give_back`. Raises KVMemError."""
        with self._lock:
            if self.closed:
                raise ClosedError("The server is shutting down. Try again later.")
            if namespace not in self._open:
                settings = self._settings.model_copy(update={"namespace": namespace})
                self._open[namespace] = KVMem(self._model, self._store, settings=settings)
            self._open.move_to_end(namespace)
            self._users[namespace] += 1
            self._close_idle()
            return self._open[namespace]

    def give_back(self, namespace: str) -> None:
        with self._lock:
            self._users[namespace] -= 1
            if not self._users[namespace]:
                del self._users[namespace]
            self._close_idle()

    def _close_idle(self) -> None:
        for namespace in [name for name in self._open if not self._users[name]]:
            if len(self._open) <= self._limit:
                return
            self._open.pop(namespace).close()

    def close(self) -> None:
        """Close all engines and cancel their running work."""
        with self._lock:
            self.closed = True
            engines = list(self._open.values())
            self._open.clear()
        for mem in engines:
            mem.close()
