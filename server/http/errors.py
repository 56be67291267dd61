"""Every error, as OpenAI's body: ``{"error": {"message", "type", "param", "code"}}``. The one place that maps them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from weft.adapters.errors import AdapterError
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, NotFound, Overloaded, RequestError
from weft.server.http.messages import UNFIT
from weft.server.http.responses import JsonResponse

log = structlog.get_logger(__name__)

UNAVAILABLE_RETRY_AFTER = 2
"""Seconds; a restart of the engine takes about as long as loading a small model."""
MAX_SHOWN = 200
"""Characters of a client's value that an error repeats."""


class Unauthorized(RequestError):
    """No key, or one that does not open this route (401)."""

    code = "invalid_api_key"


class ErrorFields(BaseModel):
    """What is said of an error."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


DOCUMENTED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""For the OpenAPI document, in place of FastAPI's own form of error."""


@dataclass(frozen=True)
class ErrorReply:
    """An error as it goes over the wire.

    Attributes:
        type: OpenAI's class of error, for programs that know no code.
    """

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JsonResponse(self.body, status_code=self.status, headers=self.headers)


_REQUEST_ERRORS: tuple[tuple[type[RequestError], int, str], ...] = (
    (Unauthorized, 401, "authentication_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (NotFound, 404, "not_found_error"),
    (Conflict, 409, "conflict_error"),
    (Overloaded, 429, "rate_limit_error"),
    (EngineUnavailable, 503, "service_unavailable_error"),
)


def error_reply(error: Exception) -> ErrorReply:
    """What a client is told of ``error``. What is not a known error says nothing of the inside."""
    if isinstance(error, RequestError):
        return _request_error(error)
    if isinstance(error, AdapterError):
        return ErrorReply(422, "adapter_error", error.message, error.param, error.code)
    if isinstance(error, RequestValidationError):
        return _validation_error(error.errors())
    if isinstance(error, HTTPException):
        return _http_error(error)
    return ErrorReply(500, "server_error", "internal error; the server's log has the details", None, "internal_error")


def install(app: FastAPI) -> None:
    """Have every error of the application answered by ``error_reply``."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_reply(error).response()

    for kind in (RequestError, AdapterError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _request_error(error: RequestError) -> ErrorReply:
    status, kind = next(((s, k) for cls, s, k in _REQUEST_ERRORS if isinstance(error, cls)), (400, "request_error"))
    headers = {}
    if isinstance(error, Conflict) and error.code == "precondition_failed":
        status = 412
    elif isinstance(error, Overloaded):
        headers = {"Retry-After": str(error.retry_after)}
    elif isinstance(error, EngineUnavailable):
        headers = {"Retry-After": str(UNAVAILABLE_RETRY_AFTER)}
    elif isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    return ErrorReply(status, kind, error.message, error.param, error.code, headers)


def _http_error(error: HTTPException) -> ErrorReply:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    message = error.detail or HTTPStatus(error.status_code).phrase
    return ErrorReply(error.status_code, kind, message, None, codes.get(error.status_code), dict(error.headers or {}))


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> ErrorReply:
    """The first of pydantic's errors, in a sentence that names the field."""
    first = errors[0]
    param = _path(first["loc"])
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
        return ErrorReply(400, "invalid_request_error", message, None, "invalid_json")
    if param is None:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return ErrorReply(400, "invalid_request_error", message, None, "invalid_body")
    if first["type"] == "missing":
        return ErrorReply(400, "invalid_request_error", f"'{param}' is required", param, "missing_field")
    if first["type"] == "extra_forbidden":
        *outer, name = first["loc"]  # which need not be an identifier, as a union's branch is none
        param = ".".join(filter(None, (_path(outer), str(name)[:MAX_SHOWN])))
        return ErrorReply(400, "invalid_request_error", f"unknown field '{param}'", param, "unknown_field")
    reason = str(first["msg"])
    if first["type"] == UNFIT:
        return ErrorReply(400, "invalid_request_error", f"'{param}': {reason}", param, "invalid_value")
    message = f"'{param}': {reason[:1].lower()}{reason[1:]}, got {_shown(first['input'])}"
    return ErrorReply(400, "invalid_request_error", message, param, "invalid_value")


def _path(loc: Sequence[str | int]) -> str | None:
    """``messages[0].content`` of pydantic's ``("body", "messages", 0, "content", "str")``."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
        elif not path:
            path = part[:MAX_SHOWN]
        # else the name of a union's branch: "(texts)"
    return path or None


def _shown(value: object) -> str:
    # The repr of a big value would be built whole only to be cut, and that of a deep one does not end.
    if isinstance(value, list | dict):
        if len(value) > 8:
            return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)} items"
        return reprlib.repr(value)[:MAX_SHOWN]
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
