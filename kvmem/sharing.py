"""Engines and models that components of one process share, by what they were opened with."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, SecretStr

from kvmem.engine import KVMem
from kvmem.model.local import LanguageModel
from kvmem.model.locate import is_remote
from kvmem.settings import Settings

# Held for a moment only: never while an engine is opened or closed.
_LOCK = threading.Lock()
_ENGINES: weakref.WeakValueDictionary[str, KVMem] = weakref.WeakValueDictionary()
_MODELS: weakref.WeakValueDictionary[str, LanguageModel] = weakref.WeakValueDictionary()
_USERS: weakref.WeakKeyDictionary[KVMem, int] = weakref.WeakKeyDictionary()
_CLOSING: weakref.WeakSet[KVMem] = weakref.WeakSet()
_OPENING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
# Engines whose share was collected. A collector must not wait for locks.
_LEFT: deque[weakref.ref[KVMem]] = deque()


class SharedEngine:
    """A component's share in an engine, which is opened by the first use.

    Components that name the same model, store and settings share one engine; those that name the same model load it
    once. The engine is closed when the last component that uses it is closed. A copy of a share is a share of its own.

    Args:
        model: a hub id, a directory, a GGUF file, an alias, or the address of a server.
        store: a directory, or None for memory.
        options: settings of `KVMem` by name.
    """

    def __init__(self, model: str, store: str | None, options: Mapping[str, Any]) -> None:
        self.model, self.store, self.options = model, store, dict(options)
        self._held: KVMem | None = None
        self._release: weakref.finalize[Any, SharedEngine] | None = None

    @property
    def key(self) -> str:
        return _key_of([self.model, self.store, self.options])

    @property
    def opened(self) -> KVMem | None:
        """The engine, if this share or another one with the same key has opened it."""
        found = self._held or _ENGINES.get(self.key)
        return None if found is None or found.closed else found

    def open(self) -> KVMem:
        """The engine. Raises what `KVMem` raises."""
        held = self._held
        if held is not None and not held.closed:
            return held
        key = self.key
        with _lock_for(key):
            if (found := self._hold(_ENGINES.get(key), key)) is not None:
                return found
            engine = open_engine(self.model, self.store, self.options)
            self._hold(engine, key)
            return engine

    def _hold(self, engine: KVMem | None, key: str) -> KVMem | None:
        """Count this share as a user of an engine, unless that is closed."""
        with _LOCK:
            _count_those_that_left()
            if engine is None or engine.closed or engine in _CLOSING:
                return None
            if self._held is not engine:
                if self._release is not None:
                    self._release.detach()
                _ENGINES[key] = engine
                _USERS[engine] = _USERS.get(engine, 0) + 1
                self._held = engine
                self._release = weakref.finalize(self, _LEFT.append, weakref.ref(engine))
            return engine

    def close(self) -> None:
        """Give up the share; the engine is closed if it was the last one. Calling it again does nothing."""
        with _LOCK:
            _count_those_that_left()
            engine, self._held = self._held, None
            if engine is None or self._release is None:
                return
            self._release.detach()
            _USERS[engine] = left = _USERS.get(engine, 1) - 1
            if left == 0:
                _CLOSING.add(engine)
        # Work that the engine waits for may itself use this module.
        if left == 0:
            engine.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEngine:
        return SharedEngine(self.model, self.store, self.options)

    def __copy__(self) -> SharedEngine:
        return self.__deepcopy__({})

    def __reduce__(self) -> tuple[type[SharedEngine], tuple[str, str | None, dict[str, Any]]]:
        return SharedEngine, (self.model, self.store, self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedEngine) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def _count_those_that_left() -> None:
    """For the holder of the lock."""
    while _LEFT:
        engine = _LEFT.popleft()()
        if engine is not None:
            _USERS[engine] = max(0, _USERS.get(engine, 1) - 1)


def _lock_for(key: str) -> threading.Lock:
    with _LOCK:
        return _OPENING[key]


def _key_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Settings as JSON; a secret as its digest, since masked secrets are all the same."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, SecretStr):
        return hashlib.sha256(value.get_secret_value().encode()).hexdigest()
    return repr(value)


def open_engine(model: str, store: str | None, options: Mapping[str, Any]) -> KVMem:
    tokenizer = options.get("tokenizer")
    given = {name: value for name, value in options.items() if name != "tokenizer"}
    if is_remote(model) or tokenizer is not None:
        return KVMem(model, store, **options)
    settings = Settings.parse(given.pop("settings", None), {n: v for n, v in given.items() if n != "retriever"})
    key = _key_of([model, settings.model])
    with _lock_for(key):
        loaded = _MODELS.get(key)
        if loaded is None:
            loaded = _MODELS[key] = LanguageModel.load(model, settings.model)
    return KVMem(loaded, store, settings=settings, retriever=given.get("retriever"))
