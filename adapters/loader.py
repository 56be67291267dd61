"""Loads adapters beside decoding: one thread that compiles them, copies them to their places and composes them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from weft.adapters.composing import Recipe
from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter
from weft.adapters.host_memory import HostMemory, Make
from weft.adapters.layout import Layout, Placement
from weft.adapters.slots import SlotPool
from weft.adapters.weighting import weigh


@dataclass
class Load:
    """Work under way; what came of it is there once it ended.

    Attributes:
        version: of the adapter.
        placement: where it goes; None: it is only made, which tells what place it needs.
        reads: the versions whose rows on the device a composition is made of; they must stay until it ended.
        made: the adapter without its sites, and its layout; of what is only made.
        error: why it failed.
        ended: when (``time.monotonic``). seconds: what it took.
    """

    version: str
    placement: Placement | None = None
    reads: tuple[str, ...] = ()
    made: tuple[CompiledAdapter, Layout] | None = None
    error: AdapterError | None = None
    ended: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """What a member of a composition can be read from.

    Attributes:
        make: compiles it.
        placement: where it is on the device, or will be; None: it is made from host memory.
        load: that brings it there, which was started before; None: it is there.
    """

    make: Make
    placement: Placement | None = None
    load: Load | None = None


class Loader:
    """Runs loads one after the other, in the order they were started.

    Args:
        host: where adapters are kept once they are compiled.
        arrived: set whenever a load ends.
    """

    def __init__(self, pool: SlotPool, host: HostMemory, arrived: threading.Event) -> None:
        self._pool = pool
        self._host = host
        self._arrived = arrived
        self._ended: deque[Load] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weft-adapter-load")

    def load(self, version: str, make: Make, placement: Placement | None) -> Load:
        """Copy an adapter to its place; it is compiled first if it is not in host memory, and that is all where it has
        no place yet."""
        load = Load(version, placement)
        compiled = self._host.get(version)  # looked up now, so that it cannot have left when its turn comes
        return self._start(load, partial(self._load, load, compiled, make))

    def compose(self, version: str, recipe: Recipe, placement: Placement, sources: Mapping[str, Source]) -> Load:
        """The weighting step, in its place. ``sources``: of the members that the recipe needs, by version."""
        reads = tuple(member for member, source in sources.items() if source.placement is not None)
        return self._start(Load(version, placement, reads), partial(self._compose, recipe, placement, sources))

    def ended(self) -> list[Load]:
        """The loads that ended since this was asked last."""
        self._arrived.clear()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def wait(self, timeout: float) -> None:
        """Sleep until a load ends, at most ``timeout`` seconds."""
        self._arrived.wait(timeout)

    def close(self) -> None:
        """Ends with the load that is running; those that wait are given up."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, load: Load, work: Callable[[], None]) -> Load:
        self._thread.submit(self._run, load, work)
        return load

    def _run(self, load: Load, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            work()
        except AdapterError as exc:
            load.error = exc
        except Exception as exc:  # whatever it is, the requests waiting for this adapter must hear of it
            load.error = AdapterError(f"loading the adapter failed: {exc}")
        load.seconds = time.perf_counter() - started
        load.ended = time.monotonic()
        self._ended.append(load)
        self._arrived.set()

    def _load(self, load: Load, compiled: CompiledAdapter | None, make: Make) -> None:
        compiled = compiled or make()
        if load.placement is None:
            load.made = compiled.outline, Layout.of(compiled)
        else:
            self._pool.upload(load.placement, compiled)
        self._host.put(load.version, compiled)

    def _compose(self, recipe: Recipe, placement: Placement, sources: Mapping[str, Source]) -> None:
        """From the members' rows on the device, or else from host memory."""
        places = {v: s.placement for v, s in sources.items() if s.load is None or s.load.error is None}
        if all(places.get(version) is not None for version in sources):
            members = [places.get(member.version) for member in recipe.composition.members]
            weigh(self._pool, placement, recipe, members)
        else:
            rows = recipe.rows(lambda v: self._host.get_or_make(v, sources[v].make), self._pool.experts)
            self._pool.fill(placement, rows)
