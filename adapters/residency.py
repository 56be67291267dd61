"""Which adapter is where: on disk, in host memory, in a device slot; and who needs it there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from weft.adapters.composing import Recipe
from weft.adapters.entries import TIERS, Derivation, Entry
from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter, Prompt
from weft.adapters.host_memory import HostMemory
from weft.adapters.layout import Layout
from weft.adapters.loader import Load
from weft.adapters.room import Room
from weft.adapters.slots import SlotPool
from weft.adapters.transfers import Transfers

Compile = Callable[[Path, str], CompiledAdapter]
"""Reads a folder and compiles it, given its version; raises AdapterError."""


class Residency:
    """The registered adapters and their tiers.

    ``register``, ``unregister`` and ``pin`` may be called from any thread. The rest belongs to the engine's thread. A
    version is held by every live request and in use while rows run; the least recently used ones make room for others,
    but for those that ``pin`` names. Loads run beside decoding, never in its way.

    Args:
        arrived: set when a load ends; may be shared between the adapters of several models that are polled together.
    """

    def __init__(
        self, pool: SlotPool, compile_adapter: Compile, *, host_bytes: int, arrived: threading.Event | None = None
    ) -> None:
        self.pool = pool
        self.loads = 0
        self.load_seconds = 0.0
        self.compositions = 0
        self.composition_seconds = 0.0
        self._compile = compile_adapter
        self._entries: dict[str, Entry] = {}
        self._unheld: set[str] = set()  # derived ones that no request needs
        self._doomed: set[str] = set()
        self._host = HostMemory(host_bytes)
        self._room = Room(pool, self._entries)
        self._transfers = Transfers(pool, self._entries, self._room, self._host, arrived or threading.Event())
        self._lock = threading.Lock()  # for all of it; the thread that loads adapters works with nothing of it
        self._clock = 0

    def register(self, version: str, folder: Path) -> CompiledAdapter:
        """Read, check and compile an adapter into host memory; from now on requests may name it. Slow; any thread.

        Raises:
            AdapterError: it cannot be served, and why; nothing is left behind.
        """
        with self._lock:
            known = self._host.get(version) if version in self._entries else None
            if known is not None:
                self._doomed.discard(version)
                return known
        compiled = self._compile(folder, version)
        layout = Layout.of(compiled)
        with self._lock:
            self._room.check_fits(layout)
            self._doomed.discard(version)
            if version not in self._entries:
                make = partial(self._compile, folder, version)
                self._entries[version] = Entry(version, make, folder, outline=compiled.outline, layout=layout)
                self._host.put(version, compiled)
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
            self._room.pin(versions)

    def knows(self, version: str) -> bool:
        """Whether the version is registered, or still held by a live request."""
        with self._lock:
            return version in self._entries

    def describe(self, version: str) -> tuple[CompiledAdapter, Layout] | None:
        """A registered adapter without its sites, and what it takes; None for one that requests may not name."""
        with self._lock:
            entry = self._entries.get(version)
            if entry is None or version in self._doomed or entry.outline is None or entry.layout is None:
                return None
            return entry.outline, entry.layout

    def outline(self, version: str) -> CompiledAdapter | None:
        """The adapter without its sites; None for one that is unknown, or derived and not made yet."""
        with self._lock:
            return self._entries[version].outline if version in self._entries else None

    def prompt(self, version: str) -> Prompt | None:
        """What the adapter puts in front of every prompt; None for most."""
        outline = self.outline(version)
        return outline.prompt if outline else None

    def compose_seconds(self, version: str, since: float) -> float | None:
        """What the weighting step took that a request accepted at ``since`` (``time.monotonic``) waited for.

        0.0 where the composition was there already; None of what is no composition.
        """
        with self._lock:
            composed = self._entries[version].composed if version in self._entries else None
            if composed is None:
                return None
            ended, seconds = composed
            return seconds if ended > since else 0.0

    def hold(self, version: str, derivation: Derivation | None = None) -> bool:
        """A live request needs the version; False when it is not registered.

        Args:
            derivation: of a version that is not registered itself; False when one of its parents is not.

        Raises:
            AdapterTooLarge: a composition that never finds room.
        """
        with self._lock:
            needed = derivation.parents if derivation else (version,)
            entries = [self._entries[name] for name in needed if name in self._entries and name not in self._doomed]
            folders = tuple(entry.folder for entry in entries if entry.folder is not None)
            if len(folders) < len(needed):
                return False
            if derivation is not None and version not in self._entries:
                entry = derivation.entry(folders)
                if entry.layout is not None:
                    self._room.check_fits(entry.layout)
                self._entries[version] = entry
            self._entries[version].holds += 1
            self._unheld.discard(version)
            return True

    def drop(self, version: str) -> None:
        """A live request ended."""
        with self._lock:
            entry = self._entries[version]
            entry.holds -= 1
            self._room.changed()
            if not entry.holds and entry.parents:
                self._unheld.add(version)

    def acquire(self, version: str, *, urgent: bool = False) -> int | None:
        """Pin the adapter's slot for a running row; None while it is not on the device (a load is then under way,
        or waits for room).

        Args:
            urgent: adapters that other waiting requests brought in may make room for it.
        """
        with self._lock:
            entry = self._entries[version]
            self._clock += 1
            entry.used = self._clock
            if entry.ready:
                assert entry.placement is not None, "a ready adapter has a place"
                entry.pins += 1
                entry.fresh = False
                self._host.get(version)  # what is used most stays there as well
                return entry.placement.slot
            if entry.absent:
                self._transfers.start(entry, urgent=urgent)
            return None

    def release(self, version: str, *, used: bool = True) -> None:
        """Give back a pin: a running row ended or was preempted, or it did not come to run (not ``used``)."""
        with self._lock:
            entry = self._entries[version]
            entry.pins -= 1
            if used:
                self._room.changed()
            else:
                entry.fresh = True

    def fit_together(self, versions: Iterable[str]) -> bool | None:
        """Whether adapters can be on the device at the same time; None while one of them is still to be made."""
        with self._lock:
            wanted = set(versions)
            if not self._room.fit_together(wanted):
                return False
            return True if all(self._entries[version].layout is not None for version in wanted) else None

    def clear_error(self, version: str) -> None:
        """Let the next request try again to load a version that failed."""
        with self._lock:
            if version in self._entries:
                self._entries[version].error = None

    def poll(self) -> list[tuple[str, AdapterError]]:
        """Publish what has arrived, forget what is to go, load what is pinned.

        Returns:
            The versions that could not be loaded, and why.
        """
        with self._lock:
            self._room.changed()
            loads = self._transfers.take_in()
            for load in loads:
                self._count(load)
            while forgettable := self._forgettable():
                for version in forgettable:
                    self._forget(version)
            for version in self._room.pinned:
                if self._entries[version].absent:
                    self._transfers.start(self._entries[version])
            return [(load.version, load.error) for load in loads if load.error is not None]

    def wait(self, timeout: float) -> None:
        """Sleep until a load ends, at most ``timeout`` seconds."""
        self._transfers.wait(timeout)

    def _count(self, load: Load) -> None:
        entry = self._entries[load.version]
        if load.error is not None:
            return
        if isinstance(entry.make, Recipe):
            entry.composed = load.ended, load.seconds
            self.compositions += 1
            self.composition_seconds += load.seconds
        else:
            self.loads += load.placement is not None
            self.load_seconds += load.seconds

    def _forgettable(self) -> list[str]:
        """Doomed adapters that nothing needs; derived ones that no request needs, once they lost their slot."""
        needed = {parent for e in self._entries.values() for parent in e.parents} if self._doomed else set()
        found = []
        for version in self._unheld | self._doomed:
            entry = self._entries[version]
            if entry.holds or version in needed or entry.load is not None:  # its rows may be being written
                continue
            if entry.placement is None or self._doomed.intersection((version, *entry.parents)):
                found.append(version)
        return found

    def _forget(self, version: str) -> None:
        self._room.forget(self._entries.pop(version))
        self._host.discard(version)
        self._unheld.discard(version)
        self._doomed.discard(version)

    def _tier(self, entry: Entry) -> str:
        if entry.load is not None:
            return "loading"
        if entry.placement is not None:
            return "device"
        return "host" if entry.version in self._host else "disk"

    def pins(self, version: str) -> int:
        with self._lock:
            return self._entries[version].pins if version in self._entries else 0

    def tiers(self) -> dict[str, str]:
        """Of every registered version: the nearest to the device that it, or what is derived from it, has reached."""
        with self._lock:
            reached = Counter[str]()
            for entry in self._entries.values():
                for version in entry.parents or (entry.version,):
                    reached[version] = max(reached[version], TIERS.index(self._tier(entry)))
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
        return self._host.nbytes

    @property
    def evictions(self) -> int:
        return self._room.evictions

    @property
    def idle(self) -> bool:
        """Nothing is being loaded or is to be, and nothing is left to forget."""
        with self._lock:
            loading = any(entry.load is not None for entry in self._entries.values())
            to_load = any(self._entries[version].absent for version in self._room.pinned)
            return not loading and not to_load and not self._forgettable()

    def close(self) -> None:
        self._transfers.close()

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
            readers = Counter(v for e in self._entries.values() if e.load is not None for v in e.load.reads)
            assert all(e.readers == readers[v] for v, e in self._entries.items()), "readers of members are lost"
