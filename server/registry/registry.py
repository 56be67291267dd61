"""Which adapters are served: ids, the versions they stand for, and the requests that hold them.

Invariants:
    An id is listed as ready exactly while the manifest has it and the engine knows its version.
    A request keeps the version it started with, whatever becomes of the id.
    Loading, replacing and unloading either happen in full or leave nothing behind, the caller's cancellation included.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from weft.adapters.errors import AdapterError
from weft.adapters.store import Store, digest
from weft.server.engine.info import AdapterInfo
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest
from weft.server.registry.aliases import Alias, Aliases
from weft.server.registry.incoming import Fetched, Incoming
from weft.server.registry.manifest import FILE, Entry, Manifest
from weft.server.registry.names import Names
from weft.server.registry.records import AdapterRecord
from weft.server.registry.versions import AdapterHost, Versions
from weft.server.runtime.wire import RemoteError

__all__ = ["AdapterRecord", "AdapterRegistry"]

FORCE_INTERVAL = 0.05
"""Seconds between two looks for requests to end, once an unload is forced."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class AdapterRegistry:
    """Adapters by id. All methods on one event loop; ``restore`` comes first.

    Attributes:
        on_unloaded: called with the id once an adapter is gone, or what else has had one of ``names``.
        names: the ids, shared with all that is named beside adapters.
    """

    def __init__(
        self,
        client: AdapterHost,
        state_dir: Path,
        *,
        roots: Sequence[Path],
        base_name: str,
        base_aliases: Sequence[str] = (),
        proxy_models: Sequence[str] = (),
    ) -> None:
        """Read the manifest.

        Args:
            state_dir: this server's alone.
            roots: local sources must lie inside one of these.
            base_name, base_aliases: what the base is called, so that no adapter is.
            proxy_models: names of the further models that adapters can belong to.

        Raises:
            ConfigError: the manifest is damaged.
        """
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.on_unloaded: list[Callable[[str], None]] = []
        self._client = client
        self.names = Names((base_name, *base_aliases, *proxy_models))
        self._bases = (None, *proxy_models)
        self._incoming = Incoming(state_dir / "incoming", roots)
        self._store = Store(state_dir / "store")
        self._manifest = Manifest(state_dir / FILE, "adapters", Entry)
        self._versions = Versions(client, self._store)
        self._aliases = Aliases(self._versions)
        self.names.join(self._aliases)
        self._tasks: set[asyncio.Task[object]] = set()
        client.on_restart.append(self._replay)

    async def restore(self) -> list[str]:
        """Bring back what the manifest lists; verified by digest. What is wrong with those that cannot be, in words.

        A broken one is listed as "failed" and stays in the manifest: a disk that was away must not unload adapters.

        Raises:
            EngineUnavailable: the engine died.
        """
        entries = list(self._manifest.entries.values())
        wanted = {entry.version for entry in entries}
        for version in await asyncio.to_thread(self._store.versions):
            if version not in wanted:  # left by a load that a crash cut short
                await asyncio.to_thread(self._store.remove, version)
        problems = await asyncio.gather(*(self._restore(entry) for entry in entries))
        await self._pin_again()
        return [problem for problem in problems if problem is not None]

    async def load(self, id: str, source: str, *, pinned: bool = False, base: str | None = None) -> AdapterRecord:
        """Serve the adapter in ``source`` as ``id``; it can be requested once this returns.

        ``base``: the proxy model it belongs to; None: the main one.

        A caller that is cancelled while the source is fetched ends the load; later, the load goes on to its end.

        Raises:
            InvalidRequest, Conflict: the id cannot be used, or is taken; no such proxy model.
            AdapterError, EngineUnavailable: the adapter cannot be served; nothing is left behind.
        """
        self.names.check_free(id)
        if base not in self._bases:
            raise InvalidRequest(f"there is no model {base!a}", param="base", code="unknown_base")
        nothing = AdapterInfo(version="", method="", forms=(), rank=0, num_sites=0, nbytes=0)
        return await self._bring(AdapterRecord(id, "", source, pinned, int(time.time()), nothing, "loading", base=base))

    async def replace(
        self, id: str, source: str, *, pinned: bool | None = None, if_match: str | None = None
    ) -> AdapterRecord:
        """Have ``id`` stand for the adapter in ``source``. Requests in flight stay on the version they have.

        Args:
            pinned: None: as it is.
            if_match: the version that ``id`` must stand for now.

        Raises:
            NotFound, Conflict: no such id; another version than ``if_match``; or the id is being changed.
            AdapterError, EngineUnavailable: the new adapter cannot be served; the old one still is.
        """
        old = self._aliases.settled(id).record
        if if_match is not None and if_match != old.version:
            raise Conflict(
                f"adapter {id!r} is at version {old.version}, not {if_match[:64]!a}",
                param="if_match",
                code="precondition_failed",
            )
        pinned = old.pinned if pinned is None else pinned
        return await self._bring(replace(old, source=source, pinned=pinned))

    async def ensure(self, id: str, source: str, *, pinned: bool = False, base: str | None = None) -> AdapterRecord:
        """``load`` it, or ``replace`` it if it is not served exactly so already. For adapters named at start."""
        if id not in self._aliases.loaded:
            return await self.load(id, source, pinned=pinned, base=base)
        record = self._aliases.loaded[id].record
        if record.base != base:
            of = "the main model" if record.base is None else repr(record.base)
            raise Conflict(f"adapter {id!r} is there already, of {of}; unload it first", param="base")
        if record.state == "ready" and (record.source, record.pinned) == (source, pinned):
            fetched = await self._incoming.fetch(source)
            try:
                if await asyncio.to_thread(digest, fetched.folder) == record.version:
                    return record
            finally:
                await fetched.discard()
        return await self.replace(id, source, pinned=pinned)

    async def unload(self, id: str, *, force_after: float | None = None) -> None:
        """Take ``id`` out of service at once; return when its requests have ended and its memory is freed.

        A caller that is cancelled does not undo it. A second call joins the first.

        Args:
            force_after: seconds to wait for the requests, before they are ended with a ``Conflict``; None: no limit.

        Raises:
            NotFound, Conflict: no such id, or it is being loaded or replaced.
            OSError: the manifest cannot be written; the adapter is served as before.
        """
        alias = self._aliases.loaded.get(id)
        if alias is None or alias.drain is None:
            alias = self._aliases.settled(id)
            before, alias.record = alias.record, replace(alias.record, state="draining")
            alias.drain = self._start(self._drain(id, alias, before))
        drain = alias.drain
        assert drain is not None
        if force_after is not None:
            await asyncio.wait({drain}, timeout=force_after)
            while not drain.done():
                self._client.cancel_streams(id, lambda: _unloaded(id))
                await asyncio.wait({drain}, timeout=FORCE_INTERVAL)
        await asyncio.shield(drain)

    def get(self, id: str) -> AdapterRecord:
        """Raises ``NotFound``."""
        return self._aliases.get(id)

    def list(self) -> list[AdapterRecord]:
        """Oldest first."""
        return self._aliases.list()

    def lease(self, id: str) -> AbstractContextManager[AdapterRecord]:
        """Hold the version that ``id`` stands for, from a request's beginning to its end; ``NotFound`` on entry."""
        return self._aliases.lease(id)

    async def _bring(self, wanted: AdapterRecord) -> AdapterRecord:
        """Fetch, then install. The id is reserved all the while."""
        self._aliases.pending[wanted.id] = wanted
        try:
            fetched = await self._incoming.fetch(wanted.source)
        except BaseException:
            del self._aliases.pending[wanted.id]
            raise
        return await asyncio.shield(self._start(self._install(wanted, fetched)))

    async def _install(self, wanted: AdapterRecord, fetched: Fetched) -> AdapterRecord:
        started = time.perf_counter()
        try:
            record = await self._commit(wanted, fetched.folder)
        except Exception as error:
            log.warning("adapter.load_failed", id=wanted.id, source=wanted.source, reason=str(error))
            raise
        finally:
            del self._aliases.pending[wanted.id]
            await fetched.discard()
        seconds = round(time.perf_counter() - started, 3)
        log.info("adapter.loaded", id=record.id, version=record.version, method=record.info.method, seconds=seconds)
        return record

    async def _commit(self, wanted: AdapterRecord, folder: Path) -> AdapterRecord:
        info = await self._versions.acquire(folder, wanted.base)
        record = replace(wanted, version=info.version, info=info, state="ready", error=None)
        try:
            if record.pinned:
                await self._pin(record.base, {record.version})
            await self._manifest.put(_entry(record))
        except BaseException:
            self._versions.release(record.held)
            await self._versions.settle()
            raise
        alias = self._aliases.loaded.get(record.id)
        if alias is None:
            self._aliases.loaded[record.id] = Alias(record)
            return record
        old, held = alias.record, alias.holds_version
        alias.record, alias.holds_version = record, True
        if old.pinned:
            await self._pin(old.base)
        if held:
            self._versions.release(old.held)  # freed now, or when its last request has ended
            await self._versions.settle()
        return record

    async def _pin(self, base: str | None, coming: AbstractSet[str] = frozenset()) -> None:
        """Tell the engine which versions of a base stay on the device: those of pinned ids, and what is ``coming``.

        Raises:
            AdapterTooLarge: what is coming would leave too little room for others.
        """
        await self._client.pin_adapters(self._aliases.pinned(base) | coming, base)

    async def _drain(self, id: str, alias: Alias, before: AdapterRecord) -> None:
        try:
            await self._manifest.drop(id)
        except BaseException:
            alias.record, alias.drain = before, None
            raise
        await alias.idle.wait()
        del self._aliases.loaded[id]
        if alias.holds_version:
            self._versions.release(before.held)
        if before.pinned and before.base in self._bases:
            with suppress(EngineUnavailable):  # then nothing is pinned
                await self._pin(before.base)
        for hook in self.on_unloaded:
            hook(id)
        await self._versions.settle()
        log.info("adapter.unloaded", id=id, version=before.version)

    async def _restore(self, entry: Entry) -> str | None:
        record = AdapterRecord(**{name: getattr(entry, name) for name in entry.__struct_fields__}, state="ready")
        try:
            self.names.check(entry.id)  # the base may have got another name
            if entry.base not in self._bases:
                raise InvalidRequest(f"its model {entry.base!r} is not among the proxy models")
            info = await self._versions.adopt(record.held)
        except (InvalidRequest, AdapterError, RemoteError, OSError) as error:
            problem = f"adapter {entry.id!r} could not be restored: {error}"
            log.error("adapter.restore_failed", id=entry.id, version=entry.version, reason=str(error))
            record = replace(record, state="failed", error=str(error))
            self._aliases.loaded[entry.id] = Alias(record, holds_version=False)
            return problem
        self._aliases.loaded[entry.id] = Alias(replace(record, info=info))
        return None

    async def _replay(self) -> None:
        """After a restart of the engine. An adapter it refuses now is listed as failed."""
        failed = await self._versions.replay()
        for alias in self._aliases.loaded.values():
            if alias.drain is None and alias.holds_version:
                error = failed.get(alias.record.held)
                alias.record = replace(alias.record, state="failed" if error else "ready", error=error)
                if error:
                    log.error("adapter.replay_failed", id=alias.record.id, reason=error)
        await self._pin_again()

    async def _pin_again(self) -> None:
        """In a new engine. It may have less memory than the one before: then adapters are served unpinned."""
        for base in self._bases:
            try:
                await self._pin(base)
            except AdapterError as error:
                log.error("adapter.not_pinned", reason=str(error))

    def _start(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Run ``work`` to its end, whoever stops waiting for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits gets it; where nobody does any more, it was logged


def _entry(record: AdapterRecord) -> Entry:
    return Entry(**{name: getattr(record, name) for name in Entry.__struct_fields__})


def _unloaded(id: str) -> Conflict:
    return Conflict(f"adapter {id!r} was unloaded while the request ran", param="model", code="adapter_unloaded")
