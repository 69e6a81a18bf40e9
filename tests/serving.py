"""A server in a thread of the tests' process, on a free port of the loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from kvmem import LanguageModel, Settings
from kvmem.serve.app import create_app
from kvmem.serve.settings import ServeSettings
from kvmem.store import MemoryStore


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of `app`, while it runs."""
    taken = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        taken.close()


@contextmanager
def serving(
    model: LanguageModel, store: Any = None, limits: ServeSettings | None = None, **settings: Any
) -> Iterator[httpx.Client]:
    """A client of a server over `model`, which is called "tiny" there; answers are short."""
    fields = {"max_tokens": 8, "split": {"minimum": 20, "maximum": 80}, **settings}
    model.name = "tiny"
    app = create_app(model, store or MemoryStore(), Settings.parse(None, fields), limits)
    with running(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client


def until_idle(client: httpx.Client, seconds: float = 5.0) -> float:
    """Seconds until nothing runs or waits any more."""
    began = time.perf_counter()
    while True:
        health = client.get("/health").json()
        if health["running"] == health["waiting"] == 0:
            return time.perf_counter() - began
        assert time.perf_counter() - began < seconds, health
        time.sleep(0.01)
