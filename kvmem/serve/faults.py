"""Errors in OpenAI's shape."""

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
    """What went wrong. type: the kind of error; param: the field that was wrong, if it was one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class FaultBody(BaseModel):
    """The body of every reply that is no success."""

    error: Fault


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_INTERNAL = "Something went wrong in the server. Its log says what; ask again later."


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return FaultBody(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()


def told(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The status and body for an error. What is not the client's doing goes to the log, and is not told."""
    if isinstance(error, QueueFullError):
        return 429, fault(429, "Too many requests wait already. Ask again in a moment.", code="queue_full")
    if isinstance(error, PromptTooLongError):
        return 400, fault(400, str(error), code="context_length_exceeded")
    if isinstance(error, AnswerTimeoutError | TimeoutError):
        message = "There was no answer in time. Ask for less, or again when there is less to do."
        return 504, fault(504, message, code="timeout")
    if isinstance(error, ClosedError):
        return 503, fault(503, "The server is closing, or the request was cancelled. Ask again.")
    if isinstance(error, RefusedError):
        logger.error("kvmem: %s", error)
        return 400, fault(400, "The server behind this one does not take the request. Ask for something simpler.")
    if isinstance(error, RemoteError | ModelNotFoundError):
        logger.error("kvmem: %s", error)
        return 502, fault(502, "The server behind this one cannot be reached, or broke off. Ask again.")
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
    """Let `app` tell every error in OpenAI's shape."""

    async def invalid(_: Request, error: Any) -> JSONResponse:
        where, what = _first(error.errors())
        return JSONResponse(fault(400, f"{where}: {what}. See /docs for what is taken." if where else what, where), 400)

    async def http(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(fault(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    async def left(_: Request, error: Exception) -> Response:
        # As nginx counts it; nobody reads this.
        return Response(status_code=499)

    app.add_exception_handler(ClientLeftError, left)

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (KVMemError, QueueFullError, TimeoutError):
        app.add_exception_handler(kind, ours)


def _first(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field and the message of the first error."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "json_invalid":
        where = ""
    return where or None, str(first["msg"])
