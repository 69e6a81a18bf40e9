"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

# Maximum number of concurrent connections; more get 503.
_CONNECTIONS = 1000


class _Server(uvicorn.Server):
    """Cancels requests in progress before waiting for them at shutdown."""

    async def shutdown(self, sockets: Any = None) -> None:
        await asyncio.to_thread(self.config.app.state.close)  # type: ignore[union-attr]
        await super().shutdown(sockets)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve an application made by `create_app` until Ctrl-C or SIGTERM."""
    # uvicorn raises the signal again when it is done; exit normally, so that the caller can close its store.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    with suppress(KeyboardInterrupt):
        _Server(config).run()
