"""The engine's own process: load, then receive commands, step, send what the step produced.

Flow control: the engine never waits for the server. Its socket has no high-water mark; what can pile up there is
bounded by the requests it has accepted (``max_num_seqs`` + ``max_queued_requests``, each by the model's length). A
slow reader of one stream is cut off on the server's side (``link.MAX_BUFFERED_DELTAS``).

Run as ``python -m weft.server.runtime.process ADDRESS FACTORY LIFELINE``: the socket, the engine's factory as
``module:name``, and a file descriptor whose other end the server holds; it reads end-of-file when the server dies.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import structlog
import zmq

from weft.server.engine.info import AdapterInfo, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.errors import RequestError
from weft.server.observability import logs
from weft.server.runtime import wire

STATS_INTERVAL = 0.1
"""Seconds between two pushed snapshots, at least."""
STATS_SHARE = 0.01
"""Of the processor's time, about, that pushed snapshots take: with thousands of adapters they come less often."""
MAX_STATS_INTERVAL = 1.0
STALL_SECONDS = 0.001
"""How long to wait for commands where every live request waits for an adapter, instead of spinning."""
LOADERS = 2
"""Adapters read and compiled at once, beside decoding."""
EXIT_FAILED = 70

log = structlog.get_logger(__name__)


class EngineLike(Protocol):
    """What the loop needs of ``weft.server.engine.engine.Engine``."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def settled(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def steps(self) -> int: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[TokenDelta]: ...

    def stats(self) -> EngineStats: ...

    def poll(self) -> None: ...

    def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo: ...

    def unregister_adapter(self, version: str, model: str | None = None) -> None: ...

    def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None: ...


class Channel:
    """The engine's end of the socket. Events can be sent from any thread; only the creating thread receives."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(address)
        self._owner = threading.get_ident()
        self._outbox: queue.SimpleQueue[wire.Event] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def send(self, event: wire.Event) -> None:
        if threading.get_ident() == self._owner:
            self._socket.send(wire.encode(event))
        else:  # a zmq socket belongs to one thread
            self._outbox.put(event)
            self.wake()

    def wake(self) -> None:
        """Ends a wait in ``receive``, from any thread or signal handler."""
        with suppress(BlockingIOError):  # a full pipe wakes just as well
            os.write(self._wake_write, b"\0")

    def receive(self, timeout: float | None) -> list[wire.Command]:
        """Wait at most ``timeout`` seconds (None: for ever) for a command or ``wake``; then all there is."""
        milliseconds = None if timeout is None else math.ceil(timeout * 1000)
        for ready, _ in self._poller.poll(milliseconds):
            if ready == self._wake_read:
                os.read(self._wake_read, 65536)  # before the outbox: what is put later wakes again
        while not self._outbox.empty():
            self._socket.send(wire.encode(self._outbox.get()))
        commands = []
        with suppress(zmq.Again):
            while True:
                commands.append(wire.decode_command(self._socket.recv(zmq.NOBLOCK)))
        return commands

    def close(self) -> None:
        """Hand over what was sent (for at most a second), then close."""
        self._context.destroy(linger=1000)


class EngineLoop:
    """Serves one engine until ``stop``. An exception of ``step`` leaves ``run``: no request can be blamed for it."""

    def __init__(self, engine: EngineLike, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="adapter-loader")
        self._stopping = False
        self._stalled = False
        self._steps = 0
        self._changed = True  # since the last snapshot
        self._next_snapshot = 0.0

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self._stopping = True
        self._channel.wake()

    def run(self) -> None:
        self._channel.send(wire.Started(self._engine.info))
        while not self._stopping:
            for command in self._channel.receive(self._patience()):
                self._handle(command)
                self._changed = True
            if self._engine.has_work:
                self._step()
            elif not self._engine.settled:
                self._engine.poll()
                self._changed = True
            self._report()

    def _patience(self) -> float | None:
        """Seconds to wait for a command: none while there is work, for ever when idle and all is reported."""
        if self._engine.has_work:
            return STALL_SECONDS if self._stalled else 0.0
        if not self._engine.settled:
            return STALL_SECONDS
        return max(0.0, self._next_snapshot - time.monotonic()) if self._changed else None

    def _step(self) -> None:
        deltas = self._engine.step()
        self._changed = True
        self._stalled = False
        if deltas:
            self._channel.send(wire.Deltas(deltas))
        else:
            # No delta: either a piece of a long prompt ran, or nothing could. Only the count of passes tells.
            steps = self._engine.steps
            self._stalled = steps == self._steps
            self._steps = steps

    def _report(self) -> None:
        now = time.monotonic()
        if self._changed and now >= self._next_snapshot:
            began = time.thread_time()  # the clock's time is also that of others on a busy machine
            self._channel.send(wire.Snapshot(self._engine.stats()))
            self._changed = False
            took = time.thread_time() - began
            self._next_snapshot = now + min(MAX_STATS_INTERVAL, max(STATS_INTERVAL, took / STATS_SHARE))

    def _handle(self, command: wire.Command) -> None:
        match command:
            case wire.Submit(request):
                self._submit(request)
            case wire.Abort(request_id):
                self._engine.abort(request_id)
            case wire.Register(call, version, folder, model):
                self._loaders.submit(self._answer, call, lambda: self._register(call, version, Path(folder), model))
            case wire.Unregister(call, version, model):
                self._loaders.submit(self._answer, call, lambda: self._unregister(call, version, model))
            case wire.Pin(call, versions, model):
                self._answer(call, lambda: self._pin(call, versions, model))
            case wire.Refresh(call):
                self._channel.send(wire.Snapshot(self._engine.stats(), call))
            case wire.Boot():
                raise ValueError("the engine was told twice what to load")

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except Exception as error:
            # An unexpected error refuses this one request: it was not accepted, so no other depends on it.
            if not isinstance(error, RequestError):
                log.exception("engine.add_failed", request_id=request.request_id)
            self._channel.send(wire.Refused(request.request_id, wire.WireError.of(error)))

    def _register(self, call: int, version: str, folder: Path, model: str | None) -> wire.Event:
        return wire.Registered(call, self._engine.register_adapter(version, folder, model))

    def _unregister(self, call: int, version: str, model: str | None) -> wire.Event:
        self._engine.unregister_adapter(version, model)
        return wire.Done(call)

    def _pin(self, call: int, versions: list[str], model: str | None) -> wire.Event:
        self._engine.pin_adapters(versions, model)
        return wire.Done(call)

    def _answer(self, call: int, work: Callable[[], wire.Event]) -> None:
        try:
            event = work()
        except Exception as error:
            failure = wire.WireError.of(error)
            if not failure.classes:
                log.exception("engine.call_failed")
            event = wire.CallFailed(call, failure)
        self._changed = True
        self._channel.send(event)


def serve(address: str, factory: str, lifeline: int) -> int:
    """Load and serve; the process's exit code. ``factory`` is ``module:name``, called like ``Engine``."""
    threading.Thread(target=_follow, args=(lifeline,), name="lifeline", daemon=True).start()
    # Adapters are read in threads: the decode loop must not wait the default 5 ms for its turn.
    sys.setswitchinterval(0.0005)
    channel = Channel(address)
    (boot,) = channel.receive(None)
    if not isinstance(boot, wire.Boot):
        raise TypeError(f"the first message must say what to load, got {type(boot).__name__}")
    logs.configure(boot.logging)
    try:
        engine = _build(factory)(boot.config, progress=lambda stage: channel.send(wire.Progress(stage)))
        loop = EngineLoop(engine, channel)
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        loop.run()
    except Exception as error:
        failure = wire.WireError.of(error)
        if not failure.classes:
            log.exception("engine.failed")
        channel.send(wire.Failed(failure))
        return EXIT_FAILED
    finally:
        channel.close()
    return 0


def _build(factory: str) -> Callable[..., EngineLike]:
    module, _, name = factory.partition(":")
    built: Any = getattr(importlib.import_module(module), name)
    return built  # type: ignore[no-any-return]


def _follow(lifeline: int) -> None:
    """Die with the server, even in the middle of loading: nothing here outlives it."""
    os.read(lifeline, 1)
    os._exit(1)


if __name__ == "__main__":
    code = serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: it would wait for adapters being read
