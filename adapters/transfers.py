"""Has adapters brought to the device: what is loaded where, and what becomes of it when it has arrived."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from weft.adapters.composing import Recipe
from weft.adapters.entries import Entry
from weft.adapters.errors import AdapterTooLarge
from weft.adapters.host_memory import HostMemory
from weft.adapters.loader import Load, Loader, Source
from weft.adapters.room import Room
from weft.adapters.slots import SlotPool


class Transfers:
    """Starts loads where there is room for them, and publishes what they brought. For one thread at a time.

    Args:
        entries: the adapters that are there, by version; they stay while their load goes on.
        host: where those are that are compiled.
        arrived: set whenever a load ends.
    """

    def __init__(
        self, pool: SlotPool, entries: Mapping[str, Entry], room: Room, host: HostMemory, arrived: threading.Event
    ) -> None:
        self._pool = pool
        self._entries = entries
        self._room = room
        self._host = host
        self._loader = Loader(pool, host, arrived)

    def start(self, entry: Entry, *, urgent: bool = False) -> None:
        """Have an adapter brought to a place, or made where that tells what place it needs; nothing without room.

        Args:
            urgent: as for ``Room.reserve``.
        """
        placement = None
        if entry.layout is not None:
            placement = self._room.reserve(entry.layout, urgent=urgent)
            if placement is None:
                return
        entry.placement = placement
        if not isinstance(entry.make, Recipe):
            entry.load = self._loader.load(entry.version, entry.make, placement)
        elif placement is not None:
            entry.load = self._loader.compose(entry.version, entry.make, placement, self._sources(entry, entry.make))

    def take_in(self) -> list[Load]:
        """Publish what has arrived. The loads that ended, each with its error if it came to nothing."""
        loads = self._loader.ended()
        for load in loads:
            entry = self._entries[load.version]
            entry.load = None
            self._room.let_go(self._entries[version] for version in load.reads)
            if load.made is not None:
                self._describe(entry, load)
            if load.error is not None:
                self._room.vacate(entry)
                entry.error = load.error
            elif load.placement is not None:
                self._pool.publish(load.placement)
                entry.fresh = True
        return loads

    def wait(self, timeout: float) -> None:
        """Sleep until a load ends, at most ``timeout`` seconds."""
        self._loader.wait(timeout)

    def close(self) -> None:
        """Ends with the load that is running."""
        self._loader.close()

    def _sources(self, entry: Entry, recipe: Recipe) -> dict[str, Source]:
        """Where the members of a composition are read. Those that are not on the device are brought there first.

        Where there is no room for all of them, and where values must be put in order, it is made from host memory.
        """
        members = {version: self._entries[version] for version in recipe.sources}
        missing = None if recipe.sparse else self._room.gather(list(members.values()), entry)
        sources = {}
        for version, member in members.items():
            assert not isinstance(member.make, Recipe), "members are registered adapters"
            if missing is None:
                sources[version] = Source(member.make)
                continue
            member.used = entry.used
            if member in missing:
                member.load = self._loader.load(version, member.make, member.placement)
            sources[version] = Source(member.make, member.placement, member.load)
        return sources

    def _describe(self, entry: Entry, load: Load) -> None:
        """Keep what an adapter turned out to be when it was made, unless it never finds room."""
        assert load.made is not None, "it was made"
        outline, layout = load.made
        try:
            self._room.check_fits(layout)
        except AdapterTooLarge as error:
            self._host.discard(entry.version)
            load.error = error
        else:
            entry.outline, entry.layout = outline, layout
