"""One life of the engine process, as the server sees it: the process, its socket, and what is open on it.

Invariant: every stream and call opened here ends exactly once: with its answer, or with ``EngineUnavailable`` when
the process ends.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import suppress
from typing import Any

import structlog
import zmq
import zmq.asyncio

from weft.server.config import ConfigError
from weft.server.engine.info import EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, RequestError
from weft.server.runtime import wire

MAX_BUFFERED_DELTAS = 1024
"""Deltas that may wait for the reader of one stream; beyond, the request is aborted."""
DRAIN_MS = 20
"""After the process's end: how long to wait for the next message it had still sent."""

log = structlog.get_logger(__name__)


class _Stream:
    """What waits for the reader of one request."""

    def __init__(self, request: EngineRequest, ids: Collection[str]) -> None:
        self.request = request
        self.ids = ids
        self._queue: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()

    @property
    def overrun(self) -> bool:
        return self._queue.qsize() >= MAX_BUFFERED_DELTAS

    def put(self, item: TokenDelta | Exception) -> None:
        self._queue.put_nowait(item)

    async def get(self) -> TokenDelta:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class EngineLink:
    """Starts one engine process and talks to it. All methods on the event loop's thread.

    Nothing can be opened on it once ``closed`` is True.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        *,
        on_progress: Callable[[str], None],
        on_stats: Callable[[EngineStats], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[str] = loop.create_future()
        self._address = address
        self._on_progress = on_progress
        self._on_stats = on_stats
        self._loaded: asyncio.Future[ModelInfo] = loop.create_future()
        # None: aborted; its terminal delta has not come yet, so the id cannot be used again.
        self._streams: dict[str, _Stream | None] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._failure: Exception | None = None
        self._stop_reason: str | None = None
        self._lifeline: int | None = None
        self._process: Process | None = None
        self._socket: zmq.asyncio.Socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def closed(self) -> bool:
        return self._closed.done()

    async def wait_closed(self) -> str:
        """Wait until the process has ended and everything open on it was told; the reason."""
        return await asyncio.shield(self._closed)

    async def open(self, boot: wire.Boot, factory: str) -> ModelInfo:
        """Start the process and wait until the model is loaded. Raises ``ConfigError`` with the reason if it cannot."""
        lifeline, self._lifeline = os.pipe()
        # -P: the working directory stays off sys.path; it may hold a folder named like a package (`kernels`).
        command = [sys.executable, "-P", "-m", "weft.server.runtime.process", self._address, factory, str(lifeline)]
        try:
            # A session of its own: Ctrl-C reaches the server alone, which then lets the engine finish its requests.
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=(lifeline,), stdin=DEVNULL, start_new_session=True
            )
        finally:
            os.close(lifeline)
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch(self._process))
        self._send(boot)
        return await self._loaded

    async def close(self, reason: str, *, grace: float) -> None:
        """End the process: politely, and after ``grace`` seconds for certain. What is open ends with ``reason``."""
        self._stop_reason = reason
        if self._process is not None:
            for stop in (self._process.terminate, self._process.kill):
                if not self._watcher.done():
                    with suppress(ProcessLookupError):
                        stop()
                    await asyncio.wait({self._watcher}, timeout=grace)
            await self._watcher
        if not self._closed.done():  # the process never started
            self._end(reason)
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        self._socket.close(linger=0)

    async def generate(self, request: EngineRequest, ids: Collection[str] = ()) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas, up to and with the terminal one. Closing the generator early aborts the request.

        Args:
            ids: of the adapters it runs with; default: the one it is accounted under.

        Raises:
            RequestError: refused by the engine, cut off by ``cancel``, or read too slowly.
            EngineUnavailable: the engine's process ended.
        """
        stream = self._submit(request, ids or (request.adapter_name or "",))
        finished = False
        try:
            while not finished:
                delta = await stream.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self._abort(request.request_id, stream)

    def cancel(self, id: str, error: Callable[[], RequestError]) -> int:
        """Abort every request that runs with the adapter ``id``; their streams raise. How many there were."""
        found = [s for s in self._streams.values() if s is not None and id in s.ids]
        for stream in found:
            self._abort(stream.request.request_id, stream)
            stream.put(error())
        return len(found)

    async def call(self, command: Callable[[int], wire.Command]) -> Any:
        """Send a numbered command and wait for its answer; raises the engine's error, or ``EngineUnavailable``."""
        self._check_open()
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(command(number))
            return await future
        finally:
            self._calls.pop(number, None)

    def _submit(self, request: EngineRequest, ids: Collection[str]) -> _Stream:
        self._check_open()
        if request.request_id in self._streams:
            raise Conflict(f"a request with id {request.request_id!r} is in flight", param="request_id")
        try:
            self._send(wire.Submit(request))
        except (OverflowError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"the request holds a value that cannot be sent to the engine: {error}") from None
        stream = self._streams[request.request_id] = _Stream(request, ids)
        return stream

    def _abort(self, request_id: str, stream: _Stream) -> None:
        """No-op where the request is over. Does not wait: it runs while a task is being cancelled."""
        if self._streams.get(request_id) is stream:
            self._streams[request_id] = None
            self._send(wire.Abort(request_id))

    def _check_open(self) -> None:
        if self._closed.done():
            raise EngineUnavailable(self._closed.result())

    def _send(self, command: wire.Command) -> None:
        # Without a high-water mark the socket takes it at once, or, before the engine has connected, keeps it in order.
        self._socket.send(wire.encode(command))

    async def _read(self) -> None:
        try:
            while True:
                # Being cancelled while waiting here loses no message; `recv` then does not wait.
                await self._socket.poll()
                self._receive(await self._socket.recv())
                # Readers get their turn between messages: being many messages behind does not make them slow.
                await asyncio.sleep(0)
        except Exception:
            log.exception("engine.message_failed")
            if self._process is not None:
                self._process.kill()

    async def _watch(self, process: Process) -> None:
        code = await process.wait()
        self._reader.cancel()
        await asyncio.wait({self._reader})
        try:
            while await self._socket.poll(DRAIN_MS):
                self._receive(await self._socket.recv())
        except Exception:
            log.exception("engine.message_failed")
        self._end(self._stop_reason or f"the engine ended ({self._failure or _exit_text(code)})")

    def _end(self, reason: str) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(
                self._failure if isinstance(self._failure, ConfigError) else ConfigError(f"could not load: {reason}")
            )
            self._loaded.exception()  # nobody may be waiting any more; that is no error of its own
        self._closed.set_result(reason)
        for stream in self._streams.values():
            if stream is not None:
                stream.put(EngineUnavailable(reason))
        self._streams.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineUnavailable(reason))

    def _receive(self, data: bytes) -> None:
        match wire.decode_event(data):
            case wire.Deltas(deltas):
                for delta in deltas:
                    self._deliver(delta)
            case wire.Refused(request_id, error):
                if stream := self._streams.pop(request_id, None):
                    stream.put(error.exception())
            case wire.Snapshot(stats, call):
                self._on_stats(stats)
                self._answer(call, stats)
            case wire.Registered(call, info):
                self._answer(call, info)
            case wire.Done(call):
                self._answer(call, None)
            case wire.CallFailed(call, error):
                self._answer(call, error.exception())
            case wire.Progress(stage):
                self._on_progress(stage)
            case wire.Started(info):
                if not self._loaded.done():
                    self._loaded.set_result(info)
            case wire.Failed(error):
                self._failure = error.exception()

    def _deliver(self, delta: TokenDelta) -> None:
        """A delta of an aborted request finds no reader and is dropped; its terminal one frees the id."""
        stream = self._streams.get(delta.request_id)
        if delta.finish_reason is not None:
            self._streams.pop(delta.request_id, None)
        if stream is None:
            return
        if stream.overrun and delta.finish_reason is None:
            self._abort(delta.request_id, stream)
            stream.put(RequestError("the stream was ended: its reader is too slow", code="slow_reader"))
        else:
            stream.put(delta)

    def _answer(self, call: int | None, result: object) -> None:
        future = self._calls.pop(call, None) if call is not None else None
        if future is None or future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"killed by {name}"
