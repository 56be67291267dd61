"""Which adapter is where: on disk, in host memory, in a device slot. Loads run beside decoding, never in its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter, Prompt
from weft.adapters.slots import Layout, Placement, SlotPool

Compile = Callable[[Path, str], CompiledAdapter]
"""Reads a folder and compiles it, given its version; raises AdapterError."""

NOTHING = Layout({})
"""What an adapter that is still to come needs at least: a slot."""


@dataclass
class _Entry:
    """One registered adapter.

    Attributes:
        compiled: while it is in host memory.
        prompt: what it puts in front of every prompt, small enough to stay there.
        placement: while it is on the device or on its way.
        ready: whether the placement is published.
        holds: live requests, waiting or running. pins: running rows.
        fresh: published, and not used since.
        error: why it could not be loaded again.
    """

    version: str
    folder: Path
    layout: Layout
    nbytes: int
    compiled: CompiledAdapter | None
    prompt: Prompt | None = None
    placement: Placement | None = None
    ready: bool = False
    holds: int = 0
    pins: int = 0
    fresh: bool = False
    error: AdapterError | None = None
    used: int = 0

    @property
    def tier(self) -> str:
        if self.placement is not None:
            return "device" if self.ready else "loading"
        return "host" if self.compiled is not None else "disk"


@dataclass(frozen=True)
class _Upload:
    """A load that ended, in the background thread, for the engine's thread to publish."""

    entry: _Entry
    placement: Placement
    error: AdapterError | None


class Residency:
    """The registered adapters and their tiers.

    ``register``, ``unregister`` and ``pin`` may be called from any thread. The rest belongs to the engine's thread. A
    version is held by every live request and in use while rows run; the least recently used ones make room for others,
    but for those that ``pin`` names.
    """

    def __init__(self, pool: SlotPool, compile_adapter: Compile, *, host_bytes: int) -> None:
        self.pool = pool
        self.host_bytes = host_bytes
        self.loads = 0
        self.load_seconds = 0.0
        self.evictions = 0
        self._compile = compile_adapter
        self._entries: dict[str, _Entry] = {}
        self._pinned: set[str] = set()
        self._doomed: set[str] = set()
        self._uploads: list[_Upload] = []
        self._lock = threading.RLock()
        self._arrived = threading.Event()
        self._clock = 0
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="weft-adapter-load")

    def register(self, version: str, folder: Path) -> CompiledAdapter:
        """Read, check and compile an adapter into host memory; from now on requests may name it. Slow; any thread.

        Raises:
            AdapterError: it cannot be served, and why; nothing is left behind.
        """
        with self._lock:
            entry = self._entries.get(version)
            if entry is not None and entry.compiled is not None:
                self._doomed.discard(version)
                return entry.compiled
        compiled = self._compile(folder, version)
        layout = Layout.of(compiled)
        with self._lock:
            self.pool.check_fits(layout, beside=self._pinned_layouts())
            self._doomed.discard(version)
            if version not in self._entries:
                self._entries[version] = _Entry(version, folder, layout, compiled.nbytes, compiled, compiled.prompt)
            self._trim_host(keep=version)
        return compiled

    def unregister(self, version: str) -> None:
        """Forget an adapter once no live request holds it. Any thread."""
        with self._lock:
            if version in self._entries:
                self._doomed.add(version)

    def pin(self, versions: Iterable[str]) -> None:
        """From now on these versions, and no others, stay on the device whether they are used or not. Any thread.

        Raises:
            AdapterTooLarge: some other registered adapter would then never find room; the pins are as before.
        """
        with self._lock:
            wanted = {version for version in versions if version in self._entries}
            layouts = [self._entries[version].layout for version in wanted]
            for layout in [e.layout for e in self._entries.values() if e.version not in wanted] or [NOTHING]:
                self.pool.check_fits(layout, beside=layouts)
            self._pinned = wanted

    def _pinned_layouts(self) -> list[Layout]:
        return [self._entries[version].layout for version in self._pinned]

    def knows(self, version: str) -> bool:
        """Whether the version is registered, or still held by a live request."""
        with self._lock:
            return version in self._entries

    def hold(self, version: str) -> bool:
        """A live request names the version; False when it is not registered."""
        with self._lock:
            entry = self._entries.get(version)
            if entry is None or version in self._doomed:
                return False
            entry.holds += 1
            return True

    def prompt(self, version: str) -> Prompt | None:
        """What the adapter puts in front of every prompt; None for most, and for an unknown version."""
        with self._lock:
            return self._entries[version].prompt if version in self._entries else None

    def drop(self, version: str) -> None:
        """A live request ended."""
        with self._lock:
            self._entries[version].holds -= 1

    def acquire(self, version: str) -> int | None:
        """Pin the adapter's slot for a running row; None while it is not on the device (a load is then under way,
        or waits for room)."""
        with self._lock:
            entry = self._entries[version]
            self._clock += 1
            entry.used = self._clock
            if entry.ready:
                assert entry.placement is not None, "a ready adapter has a place"
                entry.pins += 1
                entry.fresh = False
                return entry.placement.slot
            if entry.placement is None and entry.error is None:
                self._start_load(entry)
            return None

    def release(self, version: str) -> None:
        """A running row ended or was preempted."""
        with self._lock:
            self._entries[version].pins -= 1

    def poll(self) -> list[tuple[str, AdapterError]]:
        """Publish what has arrived, forget what is to go, load what is pinned.

        Returns:
            The versions that could not be loaded, and why.
        """
        with self._lock:
            uploads, self._uploads = self._uploads, []
            self._arrived.clear()
            failed = []
            for upload in uploads:
                entry = upload.entry
                if upload.error is not None:
                    self._vacate(entry)
                    entry.error = upload.error
                    failed.append((entry.version, upload.error))
                else:
                    self.pool.publish(upload.placement)
                    entry.ready = entry.fresh = True
            for version in [v for v in self._doomed if not self._entries[v].holds]:
                self._forget(version)
            for version in self._pinned:
                entry = self._entries[version]
                if entry.placement is None and entry.error is None:
                    self._start_load(entry)
            return failed

    def _forget(self, version: str) -> None:
        entry = self._entries[version]
        if entry.placement is None or entry.ready:  # else its pages are being written
            self._vacate(entry)
            del self._entries[version]
            self._doomed.discard(version)
            self._pinned.discard(version)

    def wait(self, timeout: float) -> None:
        """Sleep until a load ends, at most ``timeout`` seconds."""
        self._arrived.wait(timeout)

    def clear_error(self, version: str) -> None:
        """Let the next request try again to load a version that failed."""
        with self._lock:
            if version in self._entries:
                self._entries[version].error = None

    def pins(self, version: str) -> int:
        with self._lock:
            return self._entries[version].pins if version in self._entries else 0

    def tiers(self) -> dict[str, str]:
        with self._lock:
            return {version: entry.tier for version, entry in self._entries.items()}

    def holds(self) -> dict[str, int]:
        with self._lock:
            return {version: entry.holds for version, entry in self._entries.items()}

    @property
    def host_bytes_used(self) -> int:
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.compiled is not None)

    @property
    def idle(self) -> bool:
        """Nothing is being loaded and nothing is left to forget."""
        with self._lock:
            if any(entry.tier == "loading" for entry in self._entries.values()):
                return False
            to_forget = any(not self._entries[version].holds for version in self._doomed)
            to_load = any(e.placement is None and e.error is None for e in map(self._entries.__getitem__, self._pinned))
            return not to_forget and not to_load

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _start_load(self, entry: _Entry) -> None:
        placement = self.pool.reserve(entry.layout)
        while placement is None and self._evict():
            placement = self.pool.reserve(entry.layout)
        if placement is None:
            return  # every other adapter is in use; tried again when the request is looked at next
        entry.placement = placement
        self._loader.submit(self._load, entry, placement)

    def _load(self, entry: _Entry, placement: Placement) -> None:
        """In the background thread."""
        started = time.perf_counter()
        adapter, error = entry.compiled, None
        try:
            if adapter is None:
                adapter = self._compile(entry.folder, entry.version)
            self.pool.upload(placement, adapter)
        except AdapterError as exc:
            error = exc
        except Exception as exc:  # whatever it is, the requests waiting for this adapter must hear of it
            error = AdapterError(f"loading the adapter failed: {exc}")
        with self._lock:
            if error is None:
                entry.compiled = adapter
                self._trim_host(keep=entry.version)
                self.loads += 1
                self.load_seconds += time.perf_counter() - started
            self._uploads.append(_Upload(entry, placement, error))
            self._arrived.set()

    def _evict(self) -> bool:
        """Take the slot of the least recently used adapter that nobody needs now; False if there is none.

        One that was just loaded for waiting requests stays until it was used: otherwise two adapters could evict each
        other forever.
        """
        idle = [
            e
            for e in self._entries.values()
            if e.ready and not e.pins and not (e.fresh and e.holds) and e.version not in self._pinned
        ]
        if not idle:
            return False
        self._vacate(min(idle, key=lambda e: (e.holds > 0, e.used)))
        self.evictions += 1
        return True

    def _vacate(self, entry: _Entry) -> None:
        if entry.placement is not None:
            self.pool.free(entry.placement)
        entry.placement = None
        entry.ready = entry.fresh = False

    def _trim_host(self, keep: str) -> None:
        """Drop host copies, least recently used first, until they fit their budget."""
        cached = sorted((e for e in self._entries.values() if e.compiled is not None), key=lambda e: e.used)
        total = sum(e.nbytes for e in cached)
        for entry in cached:
            if total <= self.host_bytes:
                break
            if entry.version != keep and entry.tier != "loading":
                entry.compiled = None
                total -= entry.nbytes

    def check_integrity(self) -> None:
        """Slots and pages agree with the entries.

        Raises:
            AssertionError: saying what does not hold.
        """
        with self._lock:
            self.pool.check_integrity()
            placed = sum(entry.placement is not None for entry in self._entries.values())
            assert placed == self.pool.slots_used, f"{placed} adapters placed, {self.pool.slots_used} slots used"
            assert all(e.pins <= e.holds for e in self._entries.values()), "more pins than live requests"
