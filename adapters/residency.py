"""Which adapter is where: on disk, in host memory, in a device slot. Loads run beside decoding, never in its way."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from weft.adapters.entries import TIERS, Derivation, Entry, Upload
from weft.adapters.errors import AdapterError, AdapterUnsupported
from weft.adapters.forms import CompiledAdapter, Prompt
from weft.adapters.layout import Layout, Placement
from weft.adapters.slots import SlotPool

Compile = Callable[[Path, str], CompiledAdapter]
"""Reads a folder and compiles it, given its version; raises AdapterError."""

NOTHING = Layout({})
"""What an adapter that is still to come needs at least: a slot."""


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
        self._entries: dict[str, Entry] = {}
        self._derived: set[str] = set()
        self._pinned: set[str] = set()
        self._doomed: set[str] = set()
        self._uploads: list[Upload] = []
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
            self.pool.check_fits(layout, beside=self._layouts(self._pinned))
            self._doomed.discard(version)
            if version not in self._entries:
                entry = Entry(version, partial(self._compile, folder, version), folder)
                entry.describe(compiled, layout)
                self._entries[version] = entry
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
            AdapterUnsupported: one of them is nothing without a choice of the request's.
        """
        with self._lock:
            wanted = {version for version in versions if version in self._entries}
            for version in wanted:
                self._check_pinnable(version)
            layouts = self._layouts(wanted)
            for other in [e.layout or NOTHING for e in self._entries.values() if e.version not in wanted] or [NOTHING]:
                self.pool.check_fits(other, beside=layouts)
            self._pinned = wanted

    def _check_pinnable(self, version: str) -> None:
        outline = self._entries[version].outline
        choice = next((c for c in outline.choices if c.default is None), None) if outline else None
        if choice is not None:
            raise AdapterUnsupported(
                f"an adapter that needs {choice.name!r} of every request cannot be pinned: each value is another one",
                param="pinned",
            )

    def _layouts(self, versions: Iterable[str]) -> list[Layout]:
        return [self._entries[version].layout or NOTHING for version in versions]

    def knows(self, version: str) -> bool:
        """Whether the version is registered, or still held by a live request."""
        with self._lock:
            return version in self._entries

    def hold(self, version: str, derivation: Derivation | None = None) -> bool:
        """A live request needs the version; False when it is not registered.

        Args:
            derivation: of a version that is not registered itself; False when one of its parents is not.
        """
        with self._lock:
            needed = derivation.parents if derivation else (version,)
            entries = [self._entries[name] for name in needed if name in self._entries and name not in self._doomed]
            folders = tuple(entry.folder for entry in entries if entry.folder is not None)
            if len(folders) < len(needed):
                return False
            if derivation is not None and version not in self._entries:
                self._entries[version] = Entry(version, partial(derivation.make, folders), parents=needed)
                self._derived.add(version)
            self._entries[version].holds += 1
            return True

    def outline(self, version: str) -> CompiledAdapter | None:
        """The adapter without its sites; None for one that is unknown, or derived and not made yet."""
        with self._lock:
            return self._entries[version].outline if version in self._entries else None

    def prompt(self, version: str) -> Prompt | None:
        """What the adapter puts in front of every prompt; None for most."""
        outline = self.outline(version)
        return outline.prompt if outline else None

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
                entry.making = False
                if upload.error is not None:
                    self._vacate(entry)
                    entry.error = upload.error
                    failed.append((entry.version, upload.error))
                elif upload.placement is not None:
                    self.pool.publish(upload.placement)
                    entry.ready = entry.fresh = True
            while forgettable := self._forgettable():
                for version in forgettable:
                    self._forget(version)
            for version in self._pinned:
                entry = self._entries[version]
                if entry.placement is None and entry.error is None:
                    self._start_load(entry)
            return failed

    def _forgettable(self) -> list[str]:
        """Doomed adapters that nothing needs; derived ones that no request needs, once they lost their slot."""
        parents = {parent for version in self._derived for parent in self._entries[version].parents}
        found = []
        for version in self._derived | self._doomed:
            entry = self._entries[version]
            if entry.holds or version in parents or entry.tier == "loading":  # its pages may be being written
                continue
            if entry.placement is None or self._doomed.intersection((version, *entry.parents)):
                found.append(version)
        return found

    def _forget(self, version: str) -> None:
        self._vacate(self._entries.pop(version))
        for versions in (self._derived, self._doomed, self._pinned):
            versions.discard(version)

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
        """Of every registered version: the nearest to the device that it, or what is derived from it, has reached."""
        with self._lock:
            reached = Counter[str]()
            for entry in self._entries.values():
                for version in entry.parents or (entry.version,):
                    reached[version] = max(reached[version], TIERS.index(entry.tier))
            return {version: TIERS[tier] for version, tier in reached.items()}

    def holds(self) -> dict[str, int]:
        """Live requests for every registered version, or for what is derived from it."""
        with self._lock:
            holds = Counter[str]()
            for entry in self._entries.values():
                holds.update(dict.fromkeys(entry.parents or (entry.version,), entry.holds))
            return dict(holds)

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
            to_load = any(e.placement is None and e.error is None for e in map(self._entries.__getitem__, self._pinned))
            return not self._forgettable() and not to_load

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _start_load(self, entry: Entry) -> None:
        if entry.layout is None:
            if not entry.making:
                entry.making = True
                self._loader.submit(self._load, entry, None)
            return
        placement = self.pool.reserve(entry.layout)
        while placement is None and self._evict():
            placement = self.pool.reserve(entry.layout)
        if placement is None:
            return  # every other adapter is in use; tried again when the request is looked at next
        entry.placement = placement
        self._loader.submit(self._load, entry, placement)

    def _load(self, entry: Entry, placement: Placement | None) -> None:
        """Bring an adapter to its place, or make a derived one, which tells what place it needs. In the background."""
        started = time.perf_counter()
        adapter, error = entry.compiled, None
        try:
            if adapter is None:
                adapter = entry.make()
            if placement is not None:
                self.pool.upload(placement, adapter)
            else:
                self._describe(entry, adapter)
        except AdapterError as exc:
            error = exc
        except Exception as exc:  # whatever it is, the requests waiting for this adapter must hear of it
            error = AdapterError(f"loading the adapter failed: {exc}")
        with self._lock:
            if error is None:
                entry.compiled = adapter
                self._trim_host(keep=entry.version)
                self.loads += placement is not None
                self.load_seconds += time.perf_counter() - started
            self._uploads.append(Upload(entry, placement, error))
            self._arrived.set()

    def _describe(self, entry: Entry, compiled: CompiledAdapter) -> None:
        layout = Layout.of(compiled)
        with self._lock:
            self.pool.check_fits(layout, beside=self._layouts(self._pinned))
            entry.describe(compiled, layout)

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

    def _vacate(self, entry: Entry) -> None:
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
