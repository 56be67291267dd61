"""Room for adapters on the device: which of them fit together, and which make room for others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from weft.adapters.entries import Entry
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.layout import Layout, Placement
from weft.adapters.slots import SlotPool

NOTHING = Layout({})
"""What an adapter that is still to come needs at least: a slot."""


class Room:
    """Gives the least recently used adapters' places to others; not of those that are pinned, run or are read from.

    For one thread at a time.

    Args:
        entries: the adapters that are there, by version.

    Attributes:
        pinned: the versions that stay, whether they are used or not.
        evictions: how many had to leave.
    """

    def __init__(self, pool: SlotPool, entries: Mapping[str, Entry]) -> None:
        self.pinned: AbstractSet[str] = frozenset()
        self.evictions = 0
        self._pool = pool
        self._entries = entries
        self._full = False

    def changed(self) -> None:
        """Somebody may be evicted who could not be before: those that found no room look again."""
        self._full = False

    def pin(self, versions: Iterable[str]) -> None:
        """From now on these stay, and no others, of those that are there.

        Raises:
            AdapterTooLarge: some other adapter would then never find room; the pins are as before.
            AdapterUnsupported: one of them is nothing without a choice of the request's.
        """
        self.changed()
        wanted = {version for version in versions if version in self._entries}
        for version in wanted:
            _check_pinnable(self._entries[version])
        layouts = self._layouts(wanted)
        others = [version for version in self._entries if version not in wanted]
        for other in self._layouts(others) or [NOTHING]:
            self._pool.check_fits(other, beside=layouts)
        self.pinned = wanted

    def check_fits(self, layout: Layout) -> None:
        """Raises AdapterTooLarge unless there can be room beside what is pinned."""
        self._pool.check_fits(layout, beside=self._layouts(self.pinned))

    def fit_together(self, versions: AbstractSet[str]) -> bool:
        """Whether there can be room for all of them at once, beside what is pinned."""
        return self._pool.fit(self._layouts(versions | self.pinned))

    def reserve(self, layout: Layout, *, urgent: bool = False) -> Placement | None:
        """Room for an adapter, in place of others that nobody uses; None if there is none now.

        Args:
            urgent: in place of those as well that were just loaded for waiting requests. For others these stay until
                they were used, or two adapters could evict each other forever.
        """
        if self._full and not urgent:
            return None
        placement = self._reserve(layout, held=True, urgent=urgent)
        self._full = placement is None and not self._pool.slots_free
        return placement

    def gather(self, members: Sequence[Entry], composition: Entry) -> list[Entry] | None:
        """Places for those members of a composition that have none: all stay where they are until they are let go.

        Only adapters that no request waits for make room.

        Returns:
            Those that were given a place; None where there is no room for all of them, and then nobody has a new one.
        """
        missing = [member for member in members if member.placement is None]
        if missing and not self._worthwhile(members, len(missing), composition):
            return None
        for member in members:
            member.readers += 1
        for member in missing:
            assert member.layout is not None, "what is registered has a layout"
            member.placement = self._reserve(member.layout, held=False)
            if member.placement is None:
                for other in missing:
                    self.vacate(other)
                self.let_go(members)
                return None
        return missing

    def let_go(self, members: Iterable[Entry]) -> None:
        """Members of a composition are not read any more."""
        for member in members:
            member.readers -= 1

    def vacate(self, entry: Entry) -> None:
        """Give back an adapter's place, if it has one."""
        if entry.placement is not None:
            self._pool.free(entry.placement)
        entry.placement, entry.fresh = None, False

    def forget(self, entry: Entry) -> None:
        """The same for good: its pin, if it has one, is void."""
        self.vacate(entry)
        self.pinned = self.pinned - {entry.version}

    def _worthwhile(self, members: Sequence[Entry], missing: int, composition: Entry) -> bool:
        """Whether the members may get slots, and all fit: else others would leave for nothing."""
        others = [entry for entry in self._idle(held=False) if entry not in members]
        if missing > self._pool.slots_free + len(others):
            return False
        return self.fit_together({entry.version for entry in (*members, composition)})

    def _reserve(self, layout: Layout, *, held: bool, urgent: bool = False) -> Placement | None:
        """``held``: requests may be waiting for those that make room."""
        placement = self._pool.reserve(layout)
        while placement is None and (idle := self._idle(held=held, urgent=urgent)):
            self.vacate(min(idle, key=lambda e: (e.fresh and e.holds > 0, e.holds > 0, e.used)))
            self.evictions += 1
            placement = self._pool.reserve(layout)
        return placement

    def _idle(self, *, held: bool, urgent: bool = False) -> list[Entry]:
        return [
            e
            for e in self._entries.values()
            if e.ready and not e.pins and not e.readers and e.version not in self.pinned
            if urgent or not (e.fresh and e.holds)
            if held or not e.holds
        ]

    def _layouts(self, versions: Iterable[str]) -> list[Layout]:
        return [self._entries[version].layout or NOTHING for version in versions]


def _check_pinnable(entry: Entry) -> None:
    choice = next((c for c in entry.outline.choices if c.default is None), None) if entry.outline else None
    if choice is not None:
        raise AdapterUnsupported(
            f"an adapter that needs {choice.name!r} of every request cannot be pinned: each value is another one",
            param="pinned",
        )
