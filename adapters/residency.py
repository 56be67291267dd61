"""Which adapter is where: on disk, in host memory, in a device slot. Loads run beside decoding, never in its way."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from weft.adapters.composing import Recipe
from weft.adapters.entries import TIERS, Derivation, Entry, Upload
from weft.adapters.errors import AdapterError, AdapterUnsupported
from weft.adapters.forms import CompiledAdapter, Prompt
from weft.adapters.layout import Layout, Placement
from weft.adapters.slots import SlotPool
from weft.adapters.weighting import weigh

Compile = Callable[[Path, str], CompiledAdapter]
"""Reads a folder and compiles it, given its version; raises AdapterError."""

NOTHING = Layout({})
"""What an adapter that is still to come needs at least: a slot."""


class Residency:
    """The registered adapters and their tiers.

    ``register``, ``unregister`` and ``pin`` may be called from any thread. The rest belongs to the engine's thread. A
    version is held by every live request and in use while rows run; the least recently used ones make room for others,
    but for those that ``pin`` names.

    Args:
        arrived: set when a load ends; may be shared between the adapters of several models that are polled together.
    """

    def __init__(
        self, pool: SlotPool, compile_adapter: Compile, *, host_bytes: int, arrived: threading.Event | None = None
    ) -> None:
        self.pool = pool
        self.host_bytes = host_bytes
        self.loads = 0
        self.load_seconds = 0.0
        self.evictions = 0
        self.compositions = 0
        self.composition_seconds = 0.0
        self._compile = compile_adapter
        self._entries: dict[str, Entry] = {}
        self._derived: set[str] = set()
        self._unheld: set[str] = set()
        self._pinned: set[str] = set()
        self._doomed: set[str] = set()
        self._uploads: list[Upload] = []
        self._lock = threading.RLock()
        self._arrived = arrived or threading.Event()
        self._clock = 0
        self._full = False
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
            self._full = False
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
                    self.pool.check_fits(entry.layout, beside=self._layouts(self._pinned))
                self._entries[version] = entry
                self._derived.add(version)
            self._entries[version].holds += 1
            self._unheld.discard(version)
            return True

    def describe(self, version: str) -> tuple[CompiledAdapter, Layout] | None:
        """A registered adapter without its sites, and what it takes; None for one that requests may not name."""
        with self._lock:
            entry = self._entries.get(version)
            if entry is None or version in self._doomed or entry.outline is None or entry.layout is None:
                return None
            return entry.outline, entry.layout

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
            entry = self._entries[version]
            entry.holds -= 1
            self._full = False
            if not entry.holds and version in self._derived:
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
                return entry.placement.slot
            hopeless = self._full and entry.layout is not None and not urgent
            if entry.placement is None and entry.error is None and not hopeless:
                self._start_load(entry, urgent)
            return None

    def release(self, version: str, *, used: bool = True) -> None:
        """Give back a pin: a running row ended or was preempted, or it did not come to run (not ``used``)."""
        with self._lock:
            entry = self._entries[version]
            entry.pins -= 1
            if used:
                self._full = False
            else:
                entry.fresh = True

    def fit_together(self, versions: Iterable[str]) -> bool | None:
        """Whether adapters can be on the device at the same time; None while one of them is still to be made."""
        with self._lock:
            wanted = set(versions)
            if not self.pool.fit(self._layouts(wanted | self._pinned)):
                return False
            return True if all(self._entries[version].layout is not None for version in wanted) else None

    def poll(self) -> list[tuple[str, AdapterError]]:
        """Publish what has arrived, forget what is to go, load what is pinned.

        Returns:
            The versions that could not be loaded, and why.
        """
        with self._lock:
            uploads, self._uploads = self._uploads, []
            self._arrived.clear()
            self._full = False
            failed = []
            for upload in uploads:
                entry = upload.entry
                entry.making = False
                self._leave(entry)
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
        parents: set[str] = set()
        if self._doomed:
            parents.update(parent for version in self._derived for parent in self._entries[version].parents)
        found = []
        for version in self._unheld | self._doomed:
            entry = self._entries[version]
            if entry.holds or version in parents or entry.tier == "loading":  # its pages may be being written
                continue
            if entry.placement is None or self._doomed.intersection((version, *entry.parents)):
                found.append(version)
        return found

    def _forget(self, version: str) -> None:
        self._vacate(self._entries.pop(version))
        for versions in (self._derived, self._unheld, self._doomed, self._pinned):
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

    def _start_load(self, entry: Entry, urgent: bool = False) -> None:
        if entry.layout is None:
            if not entry.making:
                entry.making = True
                self._loader.submit(self._load, entry, None)
            return
        placement = self._reserve(entry.layout, urgent=urgent)
        if placement is None:
            return  # every other adapter is in use; tried again when the request is looked at next
        entry.placement = placement
        if entry.recipe is not None:
            self._bring(entry, entry.recipe)
        self._loader.submit(self._load, entry, placement)

    def _reserve(self, layout: Layout, *, held: bool = True, urgent: bool = False) -> Placement | None:
        """Room for an adapter, in place of others that nobody uses; None if there is none.

        Args:
            held: those others may be such that live requests wait for. urgent: also such as were loaded for them.
        """
        placement = self.pool.reserve(layout)
        while placement is None and self._evict(held=held, urgent=urgent):
            placement = self.pool.reserve(layout)
        return placement

    def _bring(self, entry: Entry, recipe: Recipe) -> None:
        """Have the members of a composition on the device before it is made: their loads run first.

        Where there is no room for all of them it is made from host memory instead.
        """
        members = [self._entries[version] for version in recipe.sources]
        missing = [member for member in members if member.placement is None]
        if recipe.sparse or (missing and not self._room_for(members, missing, entry)):
            return
        for member in members:
            member.used = self._clock
            member.readers += 1
        for member in missing:
            assert member.layout is not None, "what is registered has a layout"
            member.placement = self._reserve(member.layout, held=False)
            if member.placement is None:
                break
        entry.sources = {m.version: m.placement for m in members if m.placement is not None}
        if len(entry.sources) < len(members):
            for member in missing:
                self._vacate(member)
            self._leave(entry)
            return
        for member in missing:
            self._loader.submit(self._load, member, member.placement)

    def _room_for(self, members: Sequence[Entry], missing: Sequence[Entry], entry: Entry) -> bool:
        """Whether it is worth making room: the ``missing`` members of a composition may get slots, and all fit."""
        others = [e for e in self._idle(held=False) if e not in members]
        if len(missing) > self.pool.slots_free + len(others):
            return False
        together = {e.version for e in (*members, entry)} | self._pinned
        return self.pool.fit(self._layouts(together))

    def _leave(self, entry: Entry) -> None:
        """The members of a composition are not read any more, or will not be."""
        if entry.sources is not None and entry.recipe is not None:
            for version in entry.recipe.sources:
                self._entries[version].readers -= 1
        entry.sources = None

    def _load(self, entry: Entry, placement: Placement | None) -> None:
        """Bring an adapter to its place, or make a derived one, which tells what place it needs. In the background."""
        started = time.perf_counter()
        adapter, error = entry.compiled, None
        try:
            if entry.recipe is not None and placement is not None:
                self._compose(entry, entry.recipe, placement)
            elif placement is not None:
                adapter = adapter or self._made(entry)
                self.pool.upload(placement, adapter)
            else:
                adapter = adapter or self._made(entry)
                self._describe(entry, adapter)
        except AdapterError as exc:
            error = exc
        except Exception as exc:  # whatever it is, the requests waiting for this adapter must hear of it
            error = AdapterError(f"loading the adapter failed: {exc}")
        with self._lock:
            if error is None:
                entry.compiled = adapter
                entry.filled = placement is not None
                self._trim_host(keep=entry.version)
                self._count(entry, placement, time.perf_counter() - started)
            self._uploads.append(Upload(entry, placement, error))
            self._arrived.set()

    def _count(self, entry: Entry, placement: Placement | None, seconds: float) -> None:
        if entry.recipe is not None:
            entry.composed = time.monotonic(), seconds
            self.compositions += 1
            self.composition_seconds += seconds
        else:
            self.loads += placement is not None
            self.load_seconds += seconds

    @staticmethod
    def _made(entry: Entry) -> CompiledAdapter:
        assert entry.make is not None, "only a composition is not compiled"
        return entry.make()

    def _compose(self, entry: Entry, recipe: Recipe, placement: Placement) -> None:
        """The weighting step: from the members' rows on the device, or else from host memory. In the background."""
        with self._lock:
            sources = entry.sources or {}
            there = all(v in sources and self._entries[v].filled for v in recipe.sources)
        if there:
            members = [sources.get(member.version) for member in recipe.composition.members]
            weigh(self.pool, placement, recipe, members)
        else:
            self.pool.fill(placement, recipe.rows(self._host_copy, self.pool.experts))

    def _host_copy(self, version: str) -> CompiledAdapter:
        """A registered adapter in host memory, read again if it had to leave."""
        with self._lock:
            entry = self._entries[version]
            compiled = entry.compiled
        if compiled is None:
            compiled = self._made(entry)
            with self._lock:
                entry.compiled = compiled
                self._trim_host(keep=version)
        return compiled

    def _describe(self, entry: Entry, compiled: CompiledAdapter) -> None:
        layout = Layout.of(compiled)
        with self._lock:
            self.pool.check_fits(layout, beside=self._layouts(self._pinned))
            entry.describe(compiled, layout)

    def _evict(self, *, held: bool, urgent: bool) -> bool:
        """Take the slot of the least recently used adapter that nobody needs now; False if there is none.

        One that was just loaded for waiting requests stays until it was used, but for an urgent one: otherwise two
        adapters could evict each other forever.

        Args:
            held: it may be one that waiting requests need again.
        """
        idle = self._idle(held=held, urgent=urgent)
        if not idle:
            self._full = held and not self.pool.slots_free
            return False
        self._vacate(min(idle, key=lambda e: (e.fresh and e.holds > 0, e.holds > 0, e.used)))
        self.evictions += 1
        return True

    def _idle(self, *, held: bool, urgent: bool = False) -> list[Entry]:
        return [
            e
            for e in self._entries.values()
            if e.ready and not e.pins and not e.readers and e.version not in self._pinned
            if urgent or not (e.fresh and e.holds)
            if held or not e.holds
        ]

    def _vacate(self, entry: Entry) -> None:
        if entry.placement is not None:
            self.pool.free(entry.placement)
        entry.placement = None
        entry.filled = entry.ready = entry.fresh = False

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
            readers = Counter(v for e in self._entries.values() if e.sources and e.recipe for v in e.recipe.sources)
            assert all(e.readers == readers[v] for v, e in self._entries.items()), "readers of members are lost"
