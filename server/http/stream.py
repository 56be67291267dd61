"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.adapters.errors import AdapterError
from weft.server.errors import RequestError
from weft.server.http.errors import error_reply

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
WATCH_INTERVAL = 1.0
"""Seconds between looks at whether a stream's client still takes data."""

T = TypeVar("T")


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], *, stalled: Callable[[], bool] | None = None
) -> T:
    """The result of ``work``, which is cancelled, and waited for, once the client has left or is ``stalled``.

    Raises:
        ClientDisconnect: the work was cancelled; or what ``work`` raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    interval = None if stalled is None else WATCH_INTERVAL
    try:
        done: set[asyncio.Future[Any]] = set()
        while not done and not (stalled is not None and stalled()):
            done, _ = await asyncio.wait({task, gone}, timeout=interval, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if task.cancelled():
        raise ClientDisconnect
    return task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of events, already encoded.

    The reply starts with the first event, so that an error before it has its own status; an error behind it is an
    event of its own, and the last one. What waits for a slow client is bounded by the socket's buffers here and by the
    engine client's there; a client that takes nothing for ``send_timeout`` seconds is taken for gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, send_timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._timeout = send_timeout
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send), stalled=self._stalled)
        except ClientDisconnect:
            log.info("http.client_left", stalled=self._stalled())

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send(send, first)
            try:
                async for event in events:
                    await self._send(send, event)
            except Exception as error:
                if not isinstance(error, RequestError | AdapterError):
                    log.exception("http.stream_failed")
                await self._send(send, b"data: " + orjson.dumps(error_reply(error).body) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        self._sending_since = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        self._sending_since = None

    def _stalled(self) -> bool:
        since = self._sending_since
        return since is not None and asyncio.get_running_loop().time() - since > self._timeout
