"""Guard: checks authentication, host and size of a request before it is parsed, and logs it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmem.serve.faults import fault, respond
from kvmem.serve.metrics import Metrics
from kvmem.serve.settings import LOOPBACK, ServeSettings

logger = logging.getLogger("kvmem.serve")
_OPEN = frozenset({"/health"})


class Guard:
    """ASGI middleware. Sets `request.state.namespace` to the API key's namespace, or to None without keys."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = self._refuse(scope)
        try:
            if refused is not None:
                await refused(scope, receive, watched)
            else:
                await self._app(scope, self._limited(receive), watched)
        except Exception as error:
            if status:
                raise  # the response has started; the server closes the connection
            await respond(error)(scope, receive, watched)
        finally:
            route = str(getattr(scope.get("route"), "path", "other"))
            # 499 is nginx's status for a client that disconnected before the response.
            self._metrics.request(route, status or 499)
            seconds = time.perf_counter() - started
            logger.info("%s %s %s %.3f s", scope["method"], route, status or 499, seconds)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["namespace"] = None
        size = headers.get("content-length", "")
        if size.isdigit() and int(size) > self._settings.body_bytes:
            return JSONResponse(self._too_large(), 413)
        if not self._settings.keys:
            # DNS rebinding: a web page can resolve its own host name to this machine and send requests.
            host = headers.get("host", "").lower()
            name = host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]
            if name not in LOOPBACK:
                message = f"The host {name[:100]!r} is not allowed. Use 127.0.0.1, or start the server with --keys."
                return JSONResponse(fault(403, message), 403)
            # Cross-origin requests from web pages are refused as well.
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).hostname not in LOOPBACK:
                return JSONResponse(
                    fault(403, "Cross-origin requests are not allowed. Start the server with --keys."), 403
                )
            return None
        if scope["path"] in _OPEN:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        namespace = self._settings.namespace_of(key.strip()) if scheme.lower() == "bearer" else None
        if namespace is None:
            message = "The API key is missing or unknown. Send it as 'Authorization: Bearer KEY'."
            body = fault(401, message, code="invalid_api_key")
            return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
        scope["state"]["namespace"] = namespace
        return None

    def _too_large(self) -> dict[str, Any]:
        return fault(413, f"The request is larger than {self._settings.body_bytes} bytes. Send a smaller request.")

    def _limited(self, receive: Receive) -> Receive:
        """Wrap `receive` to reject a body that is too large or arrives too slowly."""
        got, over = 0, False
        deadline = time.monotonic() + self._settings.body_timeout

        async def limited() -> Message:
            nonlocal got, over
            if over:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(
                    408, "The request body did not arrive in time. Send it faster, or send less."
                ) from None
            got += len(message.get("body", b""))
            over = not message.get("more_body", False)
            if got > self._settings.body_bytes:
                raise HTTPException(413, self._too_large()["error"]["message"])
            return message

        return limited
