"""Converts errors to OpenAI's error format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvmem.errors import (
    AnswerTimeoutError,
    ClosedError,
    InputError,
    KVMemError,
    ModelError,
    ModelNotFoundError,
    PromptTooLongError,
    RefusedError,
    RemoteError,
    StoreError,
)
from kvmem.serve.gate import QueueFullError
from kvmem.serve.job import ClientLeftError

logger = logging.getLogger("kvmem.serve")


class Fault(BaseModel):
    """An error. type: the error class; param: the invalid field, if any."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class FaultBody(BaseModel):
    """The body of every error response."""

    error: Fault


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_INTERNAL = "Internal server error. Check the server log, or try again later."


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Build the body of an error response."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return FaultBody(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()


def told(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body for an error. Server-side errors are logged, and their details are not sent."""
    if isinstance(error, QueueFullError):
        return 429, fault(429, "The request queue is full. Try again in a moment.", code="queue_full")
    if isinstance(error, PromptTooLongError):
        return 400, fault(400, str(error), code="context_length_exceeded")
    if isinstance(error, AnswerTimeoutError | TimeoutError):
        message = "The request timed out. Shorten it, or try again when the server is less busy."
        return 504, fault(504, message, code="timeout")
    if isinstance(error, ClosedError):
        return 503, fault(503, "The server is shutting down, or the request was cancelled. Try again.")
    if isinstance(error, RefusedError):
        logger.error("kvmem: %s", error)
        return 400, fault(400, "The upstream vLLM server rejected the request. Simplify it and try again.")
    if isinstance(error, RemoteError | ModelNotFoundError):
        logger.error("kvmem: %s", error)
        return 502, fault(502, "The upstream vLLM server is unreachable or dropped the connection. Try again.")
    if isinstance(error, LookupError) and isinstance(error, KVMemError):
        return 404, fault(404, str(error))
    if isinstance(error, KVMemError) and isinstance(error, InputError | ModelError):
        return 400, fault(400, str(error))
    if isinstance(error, StoreError):
        logger.error("kvmem: %s", error)
    else:
        logger.error("kvmem: a request failed", exc_info=error)
    return 500, fault(500, _INTERNAL)


def respond(error: BaseException) -> JSONResponse:
    status, body = told(error)
    return JSONResponse(body, status, headers={"Retry-After": "1"} if status in (429, 503) else None)


def install(app: FastAPI) -> None:
    """Make `app` return every error in OpenAI's format."""

    async def invalid(_: Request, error: Any) -> JSONResponse:
        where, what = _first(error.errors())
        return JSONResponse(fault(400, f"{where}: {what}. See /docs for the format." if where else what, where), 400)

    async def http(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(fault(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    async def left(_: Request, error: Exception) -> Response:
        # nginx's status for a closed connection; the client does not see it.
        return Response(status_code=499)

    app.add_exception_handler(ClientLeftError, left)

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (KVMemError, QueueFullError, TimeoutError):
        app.add_exception_handler(kind, ours)


def _first(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field and message of the first validation error."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "json_invalid":
        where = ""
    return where or None, str(first["msg"])
