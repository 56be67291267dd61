"""Slots for adapters on the device, and the tables in which kernels find the rows of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch

from weft.adapters.base import Base
from weft.adapters.bottlenecks import Fusion
from weft.adapters.errors import AdapterTooLarge
from weft.adapters.forms import CompiledAdapter
from weft.adapters.layout import Kind, Layout, Place, Placement
from weft.adapters.parts import Part
from weft.adapters.row_memory import RowMemory
from weft.adapters.side import SideShape
from weft.kernels.grouped_bottleneck import Bottlenecks
from weft.kernels.slot_rows import SlotRows

NO_PARTS: frozenset[Part] = frozenset()


class SlotPool:
    """Slots ``0 .. num_slots - 1``, their rows, and the tables the kernels read.

    ``reserve``, ``publish`` and ``free`` belong to the engine's thread, between the launches of steps; ``upload`` may
    run in any thread, because it writes only to rows that no published table names. A slot that some row of a step
    under way has must not be freed: the device may be reading its rows.

    Args:
        memory: bytes for rows; see ``RowMemory``.

    Raises:
        ValueError: ``memory`` does not hold one rank for every site.
    """

    def __init__(self, base: Base, *, num_slots: int, memory: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device
        self._base = base
        self._memory = RowMemory(base, memory, dtype, device)
        self._tables: dict[Place, SlotRows] = {}
        self._parts: dict[str, set[Part]] = {}
        self._ids: dict[tuple[str, int], torch.Tensor] = {}
        self._numbers: dict[Place, torch.Tensor] = {}
        self._kinds: dict[str, Bottlenecks] = {}
        self._networks: dict[int, tuple[SideShape, torch.Tensor | slice]] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._placed: dict[int, Placement] = {}
        self.generations = [0] * num_slots
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def slots_used(self) -> int:
        return self.num_slots - len(self._free_slots)

    @property
    def slots_free(self) -> int:
        return len(self._free_slots)

    @property
    def nbytes_total(self) -> int:
        return self._memory.nbytes_total

    @property
    def nbytes_used(self) -> int:
        return self._memory.nbytes_used

    def check_fits(self, layout: Layout, beside: Iterable[Layout] = ()) -> None:
        """Whether the adapter fits when there are no others but those ``beside`` it, which never leave.

        Raises:
            AdapterTooLarge: saying what it would take.
        """
        need, others = self._memory.need(layout), [self._memory.need(other) for other in beside]
        taken = sum(others, Counter[int]())
        if len(others) >= self.num_slots:
            raise AdapterTooLarge(
                f"{len(others)} pinned adapters take all {self.num_slots} slots; unpin one or raise --max-adapters",
                param="max_adapters",
            )
        if not self._memory.holds({width: taken[width] + count for width, count in need.items()}):
            rest = f", {self._memory.nbytes(taken)} of them taken by pinned adapters" if taken else ""
            raise AdapterTooLarge(
                f"the adapter needs {self._memory.nbytes(need)} bytes of adapter memory, of {self.nbytes_total} there "
                f"are{rest}; raise --adapter-memory",
                param="adapter_memory",
            )

    def fit(self, layouts: Iterable[Layout]) -> bool:
        """Whether all these fit at once when there are no others."""
        needs = [self._memory.need(layout) for layout in layouts]
        return len(needs) <= self.num_slots and self._memory.holds(sum(needs, Counter[int]()))

    def reserve(self, layout: Layout) -> Placement | None:
        """A slot and rows for an adapter, or None when there is no room now."""
        rows = self._memory.take(layout) if self._free_slots else None
        if rows is None:
            return None
        placement = Placement(self._free_slots.pop(), layout, rows)
        self._placed[placement.slot] = placement
        return placement

    def upload(self, placement: Placement, adapter: CompiledAdapter) -> None:
        """Copy the adapter's tensors to their rows; returns when they are there. Any thread."""
        sites = adapter.sites.items()
        self.fill(placement, (((path, part), rows) for path, f in sites for part, rows in f.parts().items()))

    def fill(self, placement: Placement, parts: Iterable[tuple[Place, torch.Tensor]]) -> None:
        """The same with the rows of each place."""
        with self.writing():
            for place, rows in parts:
                if len(rows):
                    self._memory.write(place, placement.rows[place], rows)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For writing rows that no published table names, in any thread: when this ends they are there."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def storage(self, place: Place) -> torch.Tensor:
        """All rows of the pool that those of a place are in."""
        return self._memory.storage(place)

    def experts(self, path: str) -> int:
        """How many experts there are at a path; 1 where there are none."""
        site = self._base.module(path)
        return max(1, site.experts) if site is not None else 1

    def publish(self, placement: Placement) -> None:
        """Let the kernels see an uploaded adapter under its slot."""
        self.generations[placement.slot] += 1
        for place, rows in placement.rows.items():
            if place[1] is not Part.NETWORK:  # no kernel looks for those rows
                self._set(place, placement.slot, rows)
        for path, shape in placement.layout.networks.items():
            rows = placement.rows[path, Part.NETWORK]
            adjacent = rows[-1] - rows[0] + 1 == len(rows)
            where = slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows).to(self.device)
            self._networks[placement.slot] = shape, where
        for path, ids in placement.layout.ids.items():
            self._ids[path, placement.slot] = ids.to(self.device)
        for place, number in placement.layout.numbers.items():
            if place not in self._numbers:
                self._numbers[place] = torch.zeros(self.num_slots, dtype=torch.int32, device=self.device)
            self._numbers[place][placement.slot] = number
        for path, kind in placement.layout.kinds.items():
            self._set_kind(path, placement.slot, kind)

    def free(self, placement: Placement) -> None:
        """Give back a slot and its rows, published or not."""
        slot = placement.slot
        self.generations[slot] += 1
        for place in placement.rows:
            if place in self._tables:
                self._set(place, slot, [])
        self._memory.give_back(placement.rows)
        for path in placement.layout.ids:
            self._ids.pop((path, slot), None)
        for path in placement.layout.kinds:
            self._set_kind(path, slot, None)
        self._networks.pop(slot, None)
        del self._placed[slot]
        self._free_slots.append(slot)

    def rows(self, path: str, part: Part) -> SlotRows | None:
        """The rows of every slot at one place, for the kernels; None while no slot has any."""
        return self._tables.get((path, part))

    def places(self, slot: int) -> Collection[Place]:
        """Where the adapter that a slot is reserved for has rows; nowhere where the slot is free."""
        placement = self._placed.get(slot)
        return placement.rows.keys() if placement is not None else ()

    def parts(self, path: str) -> AbstractSet[Part]:
        """The parts that some slot has rows of at a path: one look instead of many."""
        return self._parts.get(path, NO_PARTS)

    def ids(self, path: str, slot: int) -> torch.Tensor:
        """int64 tokens of the rows that a slot has as ``Part.ROWS`` at a path, ascending."""
        return self._ids[path, slot]

    def numbers(self, path: str, part: Part) -> torch.Tensor:
        """int32 ``[num_slots]``, the number that goes with a part at a path; of slots that have the part."""
        return self._numbers[path, part]

    def bottlenecks(self, path: str) -> Bottlenecks | None:
        """The bottleneck of every slot at one sublayer, for the kernel; None while no slot has any."""
        return self._kinds.get(path)

    def fusions(self, path: str, slots: Sequence[int]) -> Iterator[tuple[int, Fusion]]:
        """The fusion of those of the slots that have one at a sublayer: views, or copies of rows that lie apart."""
        table = self._tables.get((path, Part.FUSION))
        for slot in slots if table is not None and table.used_by(slots) else ():
            placement = self._placed[slot]
            shape = placement.layout.fusions.get(path)
            if shape is None or table is None:
                continue
            places = placement.rows[path, Part.FUSION]  # known here, so that nobody waits for the device
            first, count = places[0], len(places)
            if places[-1] - first + 1 == count:
                rows = table.pool[first : first + count]
            else:
                rows = table.pool.index_select(0, table.table[slot, :count].long())
            yield slot, shape.fusion(rows)

    def networks(self, slots: Sequence[int]) -> Iterator[tuple[int, SideShape, torch.Tensor]]:
        """The side network of those of the slots that have one, as its rows: a view, or a copy where they lie apart."""
        for slot in slots if self._networks else ():
            if slot in self._networks:
                shape, where = self._networks[slot]
                rows = self._memory.of_width(self._base.hidden_size)
                yield slot, shape, rows[where] if isinstance(where, slice) else rows.index_select(0, where)

    def _set_kind(self, path: str, slot: int, kind: Kind | None) -> None:
        """Say what a slot's bottleneck is, after its rows were named; forgotten when no slot has any."""
        old = self._kinds.pop(path, None)
        kinds: list[Kind | None] = list(old.host_kinds) if old else [None] * self.num_slots
        kinds[slot] = kind
        parts = [self._tables.get((path, part)) for part in (Part.DOWN, Part.DOWN_BIAS, Part.UP, Part.UP_BIAS)]
        down, down_bias, up, up_bias = parts
        if down is None or down_bias is None or up is None or up_bias is None:
            return
        inputs = old.inputs if old else torch.zeros(self.num_slots, dtype=torch.int32, device=self.device)
        activations = old.activations if old else torch.zeros_like(inputs)
        if kind is not None:
            inputs[slot], activations[slot] = kind
        self._kinds[path] = Bottlenecks(down, down_bias, up, up_bias, inputs, activations, tuple(kinds))

    def _set(self, place: Place, slot: int, rows: list[int]) -> None:
        """Name the rows of a slot in the table of a place, which is there while some slot has rows."""
        old = self._tables.get(place)
        site = self._base.module(place[0])
        experts = site.experts if site is not None else 0
        entries = max(1, experts)
        count = len(rows) // entries
        counts = list(old.host_counts) if old else [0] * self.num_slots
        counts[slot] = count
        if not any(counts):
            self._tables.pop(place, None)
            self._parts.get(place[0], set()).discard(place[1])
            return
        total = self.num_slots * entries + (1 if experts else 0)
        if old is None:
            table = torch.zeros(total, count, dtype=torch.int32, device=self.device)
        else:
            table = old.table
            if count > table.shape[1]:
                table = torch.nn.functional.pad(table, (0, count - table.shape[1]))
        device_counts = old.counts if old else torch.zeros(total, dtype=torch.int32, device=self.device)
        own = slice(slot * entries, (slot + 1) * entries)
        table[own, :count] = torch.tensor(rows, dtype=torch.int32).view(entries, count).to(self.device)
        device_counts[own] = count
        pool = self._memory.storage(place)
        self._parts.setdefault(place[0], set()).add(place[1])
        self._tables[place] = SlotRows(pool, table, device_counts, tuple(counts), experts)

    def check_integrity(self) -> None:
        """Every row is free or placed, once.

        Raises:
            AssertionError: a row is lost or held twice.
        """
        self._memory.check_integrity(placement.rows for placement in self._placed.values())
        slots = sorted([*self._placed, *self._free_slots])
        assert slots == list(range(self.num_slots)), "slots are lost or held twice"
