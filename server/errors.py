"""What can go wrong with a request, as one tree; ``http.errors`` maps it to replies in one place.

    RequestError                 base; carries the field it is about
    ├── InvalidRequest           a field's value is not acceptable (400)
    ├── NotFound                 unknown model, adapter or job (404)
    ├── Conflict                 the id is taken, or a precondition failed (409, 412)
    ├── Overloaded               the queue is full; retry later (429)
    └── EngineUnavailable        the engine died or is starting (503)

What can be wrong with an adapter is ``weft.adapters.errors.AdapterError`` (422).
"""

from __future__ import annotations


class RequestError(Exception):
    """A request that is refused. ``param`` names the field at fault; ``code`` is stable, for programs."""

    code = "request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    """A field's value is not acceptable."""

    code = "invalid_value"


class NotFound(RequestError):
    """The model, adapter or job does not exist."""

    code = "model_not_found"


class Conflict(RequestError):
    """The id is taken, or a precondition of the caller does not hold."""

    code = "conflict"


class Overloaded(RequestError):
    """Too many requests are waiting. ``retry_after`` is in seconds."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(RequestError):
    """The engine is not there to serve: it died, or has not started yet."""

    code = "engine_unavailable"
