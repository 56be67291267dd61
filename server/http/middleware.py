"""What surrounds every request: an id, a line in the log, and a bound on its body."""

from __future__ import annotations

import re
import time
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.server.observability.logs import request_context

log = structlog.get_logger(__name__)

REQUEST_ID = "x-request-id"
QUIET = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics"})
"""Asked every few seconds by machines; logged at debug."""
DRAIN_FACTOR = 8


class RequestLog:
    """Gives each request an id (the client's own, where it is a sane one), answers with it, and logs the outcome."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) else uuid4().hex
        started = time.perf_counter()
        status = 500  # of a request that ends without a reply

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        state = scope.setdefault("state", {})
        with request_context(request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                write = log.debug if scope["path"] in QUIET else log.info
                write(
                    "http.request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=round(time.perf_counter() - started, 4),
                    model=state.get("model"),
                )


class BodyLimit:
    """Refuses, with 413, a body larger than ``max_body`` bytes before anything parses it."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max:
                await self._discard(message, receive)
                raise HTTPException(413, f"the body is larger than {self._max} bytes")
            return message

        await self._app(scope, bounded, send)

    async def _discard(self, message: Message, receive: Receive) -> None:
        """Read on a while, since many clients look at the reply only after they have sent everything."""
        left = DRAIN_FACTOR * self._max
        while message.get("more_body", False) and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
