"""Versions of adapters: in the store and in the engine for as long as someone holds them.

An id holds the version it stands for, a request holds the version it started with. When the last hold is given back,
the engine forgets the version and the store deletes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from weft.adapters.store import Store
from weft.server.engine.info import AdapterInfo
from weft.server.errors import EngineUnavailable, RequestError
from weft.server.registry.records import Held

log = structlog.get_logger(__name__)


class AdapterHost(Protocol):
    """What the registry needs of ``EngineClient``."""

    @property
    def on_restart(self) -> list[Callable[[], Awaitable[None]]]: ...

    async def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo: ...

    async def unregister_adapter(self, version: str, model: str | None = None) -> None: ...

    async def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None: ...

    def cancel_streams(self, id: str, error: Callable[[], RequestError]) -> int: ...


@dataclass
class _Version:
    """Invariant: it is in the engine while ``registered``, and in the store while it is in ``Versions``.

    Attributes:
        held: which version, and of which model.
        holds: ids, requests and loads in progress.
        lock: taken for what the engine is told of this version.
        info: from the engine, once it was registered.
    """

    held: Held
    holds: int = 0
    registered: bool = False
    info: AdapterInfo | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Versions:
    """Reference-counted versions. All methods on one event loop."""

    def __init__(self, host: AdapterHost, store: Store) -> None:
        self._host = host
        self._store = store
        self._versions: dict[Held, _Version] = {}
        # A version that is being deleted cannot be added, nor the other way round.
        self._store_lock = asyncio.Lock()
        self._frees: set[asyncio.Task[None]] = set()

    async def acquire(self, folder: Path, base: str | None = None) -> AdapterInfo:
        """Copy an adapter into the store and have the engine read it. The caller then holds its version.

        Not to be cancelled: a thread cannot be stopped, and what it leaves would belong to nobody.

        Raises:
            AdapterError, EngineUnavailable: and nothing is left behind.
        """
        async with self._store_lock:
            version = await asyncio.to_thread(self._store.add, folder)
            entry = self._hold_new(Held(version, base))
        try:
            return await self._tell(entry)
        except BaseException:
            self.release(entry.held)
            await self.settle()
            raise

    async def adopt(self, held: Held) -> AdapterInfo:
        """As ``acquire``, for a version that is in the store already; its content is verified.

        Raises:
            AdapterError, EngineUnavailable: the version is not held then, but stays in the store.
        """
        await asyncio.to_thread(self._store.verify, held.version)
        entry = self._hold_new(held)
        try:
            return await self._tell(entry)
        except BaseException:
            entry.holds -= 1
            if entry.holds == 0:
                del self._versions[held]
            raise

    def hold(self, held: Held) -> None:
        """Hold a version once more that is held already."""
        self._versions[held].holds += 1

    def release(self, held: Held) -> None:
        """Give a hold back; after the last one, freeing goes on in the background (``settle``)."""
        entry = self._versions[held]
        entry.holds -= 1
        if entry.holds == 0:
            task = asyncio.create_task(self._free(entry))
            self._frees.add(task)
            task.add_done_callback(self._frees.discard)

    async def settle(self) -> None:
        """Wait until what nobody holds is freed."""
        if self._frees:
            await asyncio.wait(set(self._frees))

    async def replay(self) -> dict[Held, str]:
        """Tell a new engine of every version that is held. Those it refuses, with the reasons in words.

        Raises:
            EngineUnavailable: it died as well.
        """
        for entry in self._versions.values():
            entry.registered = False
        known = [entry for entry in self._versions.values() if entry.info is not None]
        results = await asyncio.gather(*(self._tell(entry) for entry in known), return_exceptions=True)
        for result in results:
            if isinstance(result, EngineUnavailable):
                raise result
        outcomes = zip(known, results, strict=True)
        return {entry.held: str(result) for entry, result in outcomes if isinstance(result, BaseException)}

    def _hold_new(self, held: Held) -> _Version:
        entry = self._versions.setdefault(held, _Version(held))
        entry.holds += 1
        return entry

    async def _tell(self, entry: _Version) -> AdapterInfo:
        """Register with the engine, unless that is done or nobody holds the version any more."""
        async with entry.lock:
            if not entry.registered and entry.holds:
                version, base = entry.held
                entry.info = await self._host.register_adapter(version, self._store.path(version), base)
                entry.registered = True
            assert entry.info is not None, "a version is told of again only after it was told of once"
            return entry.info

    async def _free(self, entry: _Version) -> None:
        async with self._store_lock:
            if entry.holds or self._versions.get(entry.held) is not entry:
                return  # held again, or freed already
            async with entry.lock:
                del self._versions[entry.held]
                try:
                    if entry.registered:
                        with suppress(EngineUnavailable):  # then it holds nothing
                            await self._host.unregister_adapter(*entry.held)
                    if not any(held.version == entry.held.version for held in self._versions):  # of another model
                        await asyncio.to_thread(self._store.remove, entry.held.version)
                except Exception:
                    # Nobody can be told; the copy that may be left is removed at the next start.
                    log.exception("adapter.not_freed", version=entry.held.version)
