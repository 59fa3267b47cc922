"""Errors as problem details (RFC 9457), each with a stable `code`; as other clients read them where those are asked.

The edge of HTTP: nothing raw gets past it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.exceptions import OutOfMemoryError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shared import errors
from shared.observability import logger, place_of
from shared.redis import AWAY

STATUS: dict[type[errors.RejoinError], int] = {
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.Unprocessable: 422,
    errors.TooMany: 429,
    errors.UpstreamError: 502,
    errors.Unavailable: 503,
    errors.OurError: 500,
}
STORE_AWAY = "Redis does not answer; nothing was lost, try again"
OUR_MISTAKE = "this is our mistake; the server's log has the place"
MAX_NAME_CHARS = 80
UNKNOWN = "unknown field"
UNKNOWN_STREAM = (
    "unknown field; POST /v1/chat/stream always streams, POST /v1/generations never does: it answers with an "
    "`events_url` to read"
)
log = logger("api")


@dataclass(frozen=True)
class Fault:
    """An error on its way out: what every shape of answer is made from."""

    status: int
    code: str
    detail: str
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def problem(error: errors.RejoinError, path: str = "") -> Response:
    """The response an error of ours becomes, in the shape the clients of this address read."""
    return _shaped(_fault(error), path)


def status_of(error: errors.RejoinError) -> int:
    """The HTTP status of an error of ours: that of the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def _fault(error: errors.RejoinError) -> Fault:
    headers = {}
    extra: dict[str, Any] = {}
    if isinstance(error, errors.Unavailable | errors.TooMany):
        headers["Retry-After"] = str(getattr(error, "retry_after", 1))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.Gone):
        extra["outcome"] = error.outcome
    if isinstance(error, errors.CallerError) and error.param:
        extra["param"] = error.param
    return Fault(status_of(error), error.code, error.message, headers, extra)


def _problem_json(fault: Fault) -> Response:
    body = {"type": "about:blank", "title": HTTPStatus(fault.status).phrase, "status": fault.status}
    body |= {"code": fault.code, "detail": fault.detail, **fault.extra}
    return Response(orjson.dumps(body), fault.status, headers=fault.headers, media_type="application/problem+json")


def _openai_json(fault: Fault) -> Response:
    """OpenAI's error object. Its SDKs make typed exceptions of the status, and retry a 409 unless told not to."""
    status = {"model_not_found": 404}.get(fault.code, 400 if fault.status == 422 else fault.status)
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    default = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": fault.detail, "type": kind.get(status, default), "param": fault.extra.get("param")}
    headers = {**fault.headers, **({"x-should-retry": "false"} if status == 409 else {})}
    body = {"error": {**error, "code": fault.code}}
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def _plain_text(fault: Fault) -> Response:
    """The AI SDK shows the body of a failed request as it is."""
    return Response(fault.detail, fault.status, headers=fault.headers, media_type="text/plain; charset=utf-8")


# The first prefix that fits an address decides the shape of its errors.
SHAPES: tuple[tuple[str, Callable[[Fault], Response]], ...] = (
    ("/v1/chat/completions", _openai_json),
    ("/v1/responses", _openai_json),
    ("/v1/models", _openai_json),
    ("/api/chat", _plain_text),
    ("", _problem_json),
)


def _shaped(fault: Fault, path: str) -> Response:
    return next(shape for prefix, shape in SHAPES if path.startswith(prefix))(fault)


def invalid(details: Any) -> errors.Unprocessable:
    """The first of pydantic's complaints, in a sentence that names the field and never quotes its value."""
    first = details[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
    where = where if len(where) <= MAX_NAME_CHARS else where[:MAX_NAME_CHARS] + "…"  # an unknown field's name is theirs
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = UNKNOWN_STREAM if where == "stream" else UNKNOWN
    return errors.Unprocessable(f"{where}: {message}" if where else message, param=where or None)


def install(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, errors.RejoinError)
        return problem(error, request.scope["path"])

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem(invalid(error.errors()), request.scope["path"])

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        detail = {404: "there is nothing at this address", 405: "this address does not take this method"}
        said = detail.get(error.status_code, str(error.detail))
        return _shaped(Fault(error.status_code, code, said, dict(error.headers or {})), request.scope["path"])

    async def redis_away(request: Request, error: Exception) -> Response:
        log.warning("api.redis_away", error=type(error).__name__)
        away = errors.Unavailable(STORE_AWAY, code="store_unavailable")
        return problem(away, request.scope["path"])

    async def redis_full(request: Request, error: Exception) -> Response:
        full = errors.Unavailable("Redis has no room to write; nothing was lost, try again", code="store_full")
        return problem(full, request.scope["path"])

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("api.broke", error=type(error).__name__, at=place_of(error), path=request.scope["path"][:200])
        fault = Fault(500, "internal_error", OUR_MISTAKE)
        return _shaped(fault, request.scope["path"])

    app.add_exception_handler(errors.RejoinError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    for away in AWAY:
        app.add_exception_handler(away, redis_away)
    app.add_exception_handler(OutOfMemoryError, redis_full)
    app.add_exception_handler(Exception, unexpected)
