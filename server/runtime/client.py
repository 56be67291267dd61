"""The engine as the server uses it: in its own process, watched, and restarted when it dies.

A crash costs the requests in flight (each ends with ``EngineUnavailable``) and nothing else: the process is started
again, the adapters are replayed through ``on_restart``, and only then ``ready`` turns true again.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import structlog
import zmq.asyncio

from weft.server.config import ConfigError, EngineConfig
from weft.server.engine.info import AdapterInfo, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.errors import EngineUnavailable, RequestError
from weft.server.observability.logs import LogConfig
from weft.server.runtime import wire
from weft.server.runtime.link import EngineLink

ENGINE = "weft.server.engine.engine:Engine"
SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix domain socket's path on Linux."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RestartPolicy:
    """When to start a dead engine again.

    Attributes:
        max_failures: give up after more deaths (or failed starts) than this in a row.
        window: seconds of health after which earlier deaths no longer count.
        backoff, max_backoff: seconds before the first new start, doubled each time, and at most.
        stop_grace: seconds between asking the process to end and killing it.
    """

    max_failures: int = 5
    window: float = 60.0
    backoff: float = 0.1
    max_backoff: float = 10.0
    stop_grace: float = 5.0

    def delay(self, failures: int) -> float:
        return min(self.max_backoff, self.backoff * 2.0 ** (failures - 1))


class EngineClient:
    """The engine process and its supervision. All methods on one event loop.

    Attributes:
        on_restart: awaited after a restart, before ``ready`` turns true; adapters are replayed here.
        on_stats: called with every snapshot the engine sends and the life (1, 2, ...) it belongs to.
        lives: how often the engine has been started.
        unready_reason: why ``ready`` is False, in words; None where it is True.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        ipc_dir: Path | None = None,
        factory: str = ENGINE,
        logging: LogConfig | None = None,
        policy: RestartPolicy | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self.on_restart: list[Callable[[], Awaitable[None]]] = []
        self.on_stats: list[Callable[[EngineStats, int], None]] = []
        self.stats = EngineStats()
        self.lives = 0
        self.unready_reason: str | None = "the engine has not been started"
        self._boot = wire.Boot(config, logging or LogConfig())
        self._factory = factory
        self._policy = policy or RestartPolicy()
        self._on_progress = on_progress or (lambda stage: None)
        self._ipc_parent = ipc_dir
        self._ipc_dir: Path | None = None
        self._context: zmq.asyncio.Context | None = None
        self._link: EngineLink | None = None
        self._info: ModelInfo | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """The engine is alive and knows every adapter it should."""
        return self.unready_reason is None

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise EngineUnavailable("the engine has not been started")
        return self._info

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return self._link.pid if self._link else None

    async def start(self) -> None:
        """Start the engine and wait until it has loaded. Raises ``ConfigError`` with the engine's reason."""
        if self._context is not None:
            raise RuntimeError("the engine was started already")
        self._ipc_dir = self._make_ipc_dir()
        self._context = zmq.asyncio.Context()
        try:
            await self._launch(self._context, self._ipc_dir)
        except BaseException:
            await self.stop()
            raise
        self.unready_reason = None
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the engine. Streams still open raise ``EngineUnavailable``. Safe to call twice."""
        reason = "the server is stopping"
        self.unready_reason = reason
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
            self._supervisor = None
        if self._link is not None:
            await self._link.close(reason, grace=self._policy.stop_grace)
            self._link = None
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None
        if self._ipc_dir is not None:
            shutil.rmtree(self._ipc_dir, ignore_errors=True)
            self._ipc_dir = None

    async def generate(self, request: EngineRequest, ids: Collection[str] = ()) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas, the last with a finish reason. Closing the generator early aborts the request.

        Args:
            ids: of the adapters it runs with; default: the one it is accounted under.

        Raises:
            RequestError: the engine refuses it (before the first delta), or ``cancel_streams`` ended it.
            EngineUnavailable: the engine is not ready, or dies.
        """
        if self.unready_reason is not None:
            raise EngineUnavailable(self.unready_reason)
        async with aclosing(self._alive().generate(request, ids)) as deltas:
            async for delta in deltas:
                yield delta

    def cancel_streams(self, id: str, error: Callable[[], RequestError]) -> int:
        """Abort the requests that run with the adapter ``id``; each stream raises an ``error()``. Their number."""
        return self._link.cancel(id, error) if self._link else 0

    async def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo:
        """Have the engine read an adapter, also before ``ready``. Raises ``AdapterError``, ``EngineUnavailable``.

        Args:
            model: name of the further model it is for; None: the main one.
        """
        info: AdapterInfo = await self._alive().call(lambda call: wire.Register(call, version, str(folder), model))
        return info

    async def unregister_adapter(self, version: str, model: str | None = None) -> None:
        """Have the engine forget an adapter."""
        await self._alive().call(lambda call: wire.Unregister(call, version, model))

    async def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None:
        """Keep these versions of a model's, and no others of it, on the device.

        Raises:
            AdapterTooLarge: some other adapter would then never find room. EngineUnavailable.
        """
        wanted = sorted(versions)
        await self._alive().call(lambda call: wire.Pin(call, wanted, model))

    async def refresh_stats(self) -> EngineStats:
        """A snapshot of now; ``stats`` is it too."""
        stats: EngineStats = await self._alive().call(wire.Refresh)
        return stats

    def _alive(self) -> EngineLink:
        if self._link is None or self._link.closed:
            raise EngineUnavailable(self.unready_reason or "the engine is restarting")
        return self._link

    async def _launch(self, context: zmq.asyncio.Context, ipc_dir: Path) -> None:
        self.lives += 1
        life = self.lives
        # A socket per life: nothing an earlier engine sent can reach a later one's streams.
        self._link = link = EngineLink(
            context,
            f"ipc://{ipc_dir}/{life}.sock",
            on_progress=self._on_progress,
            on_stats=lambda stats: self._set_stats(stats, life),
        )
        self._info = await link.open(self._boot, self._factory)
        log.info("engine.started", life=life, pid=link.pid, model=self._info.model, device=self._info.device)

    def _set_stats(self, stats: EngineStats, life: int) -> None:
        self.stats = stats
        for observer in self.on_stats:
            observer(stats, life)

    async def _supervise(self) -> None:
        failures = 0
        while True:
            since = time.monotonic()
            reason = await self._current().wait_closed()
            self.unready_reason = f"{reason}; restarting"
            self.stats = EngineStats()
            failures = 1 if time.monotonic() - since >= self._policy.window else failures + 1
            log.error("engine.died", reason=reason, failures=failures)
            if failures > self._policy.max_failures:
                self.unready_reason = f"{reason}; gave up after {failures} failures in a row"
                log.critical("engine.given_up", reason=reason, failures=failures)
                return
            await asyncio.sleep(self._policy.delay(failures))
            await self._revive()

    async def _revive(self) -> None:
        """Start a new engine and replay; where that fails, leave a closed link for the supervisor to find."""
        assert self._context is not None and self._ipc_dir is not None
        await self._current().close("the engine ended", grace=self._policy.stop_grace)
        try:
            await self._launch(self._context, self._ipc_dir)
            for hook in self.on_restart:
                await hook()
        except Exception as error:
            expected = isinstance(error, ConfigError | RequestError)
            log.error("engine.restart_failed", reason=str(error), exc_info=not expected)
            await self._current().close(f"the engine could not be restarted: {error}", grace=self._policy.stop_grace)
        else:
            if not self._current().closed:
                self.unready_reason = None
                log.info("engine.recovered", life=self.lives)

    def _current(self) -> EngineLink:
        assert self._link is not None, "there is a link from start to stop"
        return self._link

    def _make_ipc_dir(self) -> Path:
        """A folder only this user can enter: who can reach the socket can command the engine."""
        if self._ipc_parent is not None:
            self._ipc_parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="weft-", dir=self._ipc_parent))  # mode 0700
        if len(str(folder).encode()) + len("/999999.sock") > SOCKET_PATH_LIMIT:
            folder.rmdir()
            raise ConfigError(f"ipc_dir {folder.parent} is too long for a socket's path; use a shorter one")
        return folder
