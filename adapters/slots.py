"""Device memory for adapters: slots whose weights lie in pages of a few rank rows each.

All sites of one width share a pool of pages, so an adapter takes what its own ranks and targets need: rank 8 beside
rank 128 costs rank 8, and a site an adapter does not touch costs nothing (S-LoRA's unified paging, by width).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from weft.adapters.base import Base
from weft.adapters.errors import AdapterTooLarge
from weft.adapters.forms import CompiledAdapter
from weft.kernels.grouped_lora import RankPages

RANK_PAGE = 8
"""Rank rows in a page: the granularity of memory, and the smallest rank in common use."""


@dataclass(frozen=True)
class Layout:
    """What an adapter needs of each site, known without its tensors.

    Attributes:
        ranks: by site path; sites without a low-rank update are absent.
        biases: site paths with a bias.
    """

    ranks: Mapping[str, int]
    biases: frozenset[str]

    @classmethod
    def of(cls, adapter: CompiledAdapter) -> Layout:
        ranks = {path: forms.low_rank.rank for path, forms in adapter.sites.items() if forms.low_rank}
        return cls(ranks, frozenset(path for path, forms in adapter.sites.items() if forms.bias is not None))


@dataclass(frozen=True)
class Placement:
    """Where an adapter goes: its slot, and per site the pages for A and for B. Nobody else writes there."""

    slot: int
    layout: Layout
    a_pages: Mapping[str, list[int]]
    b_pages: Mapping[str, list[int]]


class _WidthPool:
    """Pages of rank rows of one width: ``[num_pages, RANK_PAGE, width]`` and which of them are free."""

    def __init__(self, width: int, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pages = torch.empty(num_pages, RANK_PAGE, width, dtype=dtype, device=device)
        self.free = list(range(num_pages - 1, -1, -1))

    def take(self, rank: int) -> list[int]:
        return [self.free.pop() for _ in range(_page_count(rank))]

    def write(self, pages: list[int], rows: torch.Tensor) -> None:
        """Copy ``rows`` ``[rank, width]`` into ``pages``."""
        index = torch.tensor(pages)[:, None] * RANK_PAGE + torch.arange(RANK_PAGE)
        where = index.flatten()[: len(rows)].to(self.pages.device, non_blocking=True)
        self.pages.flatten(0, 1).index_copy_(0, where, rows.to(self.pages, non_blocking=True))


class _SiteTables:
    """The page tables of one site, by slot; they grow with the largest rank seen."""

    def __init__(self, num_slots: int, a_pool: _WidthPool, b_pool: _WidthPool) -> None:
        device = a_pool.pages.device
        self.ranks = [0] * num_slots
        self.bias: torch.Tensor | None = None  # [num_slots, out], there once an adapter has a bias here
        self.biased: set[int] = set()
        empty = torch.zeros(num_slots, 1, dtype=torch.int32, device=device)
        ranks = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.pages = RankPages(a_pool.pages, b_pool.pages, empty, empty.clone(), ranks, max_rank=0)

    def set(self, slot: int, rank: int, a_pages: list[int], b_pages: list[int]) -> None:
        if len(a_pages) > self.pages.a_pages.shape[1]:
            self._widen(len(a_pages))
        for table, pages in ((self.pages.a_pages, a_pages), (self.pages.b_pages, b_pages)):
            table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device=table.device)
        self.pages.ranks[slot] = rank
        self.ranks[slot] = rank
        self.pages = replace(self.pages, max_rank=max(self.ranks))

    def _widen(self, width: int) -> None:
        tables = {}
        for name in ("a_pages", "b_pages"):
            old = getattr(self.pages, name)
            tables[name] = old.new_zeros(old.shape[0], width)
            tables[name][:, : old.shape[1]] = old
        self.pages = replace(self.pages, **tables)


class SlotPool:
    """Slots ``0 .. num_slots - 1``, their pages, and the tables the kernels read.

    ``reserve``, ``publish`` and ``free`` belong to the engine's thread, between steps; ``upload`` may run in any
    thread, because it writes only to pages that no published table names.

    Args:
        memory: bytes for rank pages, split between the widths as an adapter on every linear would use them.

    Raises:
        ValueError: ``memory`` does not hold one page for every site.
    """

    def __init__(self, base: Base, *, num_slots: int, memory: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device
        self._base = base
        widths = Counter[int]()
        for site in base.sites.values():
            widths.update((site.in_features, site.out_features))
        page_bytes = RANK_PAGE * dtype.itemsize
        per_rank_page = sum(width * count for width, count in widths.items()) * page_bytes
        copies = memory // per_rank_page
        if copies < 1:
            raise ValueError(
                f"adapter memory of {memory} bytes is below the least useful, {per_rank_page} (rank {RANK_PAGE})"
            )
        self._pools = {width: _WidthPool(width, copies * count, dtype, device) for width, count in widths.items()}
        self.capacity = {width: copies * count for width, count in widths.items()}
        self.nbytes_total = copies * per_rank_page
        self._tables = {
            path: _SiteTables(num_slots, self._pools[site.in_features], self._pools[site.out_features])
            for path, site in base.sites.items()
        }
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._placed: dict[int, Placement] = {}
        self.generations = [0] * num_slots
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def slots_used(self) -> int:
        return self.num_slots - len(self._free_slots)

    @property
    def nbytes_used(self) -> int:
        return self._nbytes(Counter({w: self.capacity[w] - len(pool.free) for w, pool in self._pools.items()}))

    def check_fits(self, layout: Layout, beside: Iterable[Layout] = ()) -> None:
        """Whether the adapter fits when there are no others but those ``beside`` it, which never leave.

        Raises:
            AdapterTooLarge: saying what it would take.
        """
        need = self._need(layout)
        taken, slots = Counter[int](), 1
        for other in beside:
            taken.update(self._need(other))
            slots += 1
        if slots > self.num_slots:
            raise AdapterTooLarge(
                f"{slots - 1} pinned adapters take all {self.num_slots} slots; unpin one or raise --max-adapters",
                param="max_adapters",
            )
        if any(taken[w] + n > self.capacity[w] for w, n in need.items()):
            rest = f", {self._nbytes(taken)} of them taken by pinned adapters" if taken else ""
            raise AdapterTooLarge(
                f"the adapter needs {self._nbytes(need)} bytes of adapter memory in rank pages, of {self.nbytes_total} "
                f"there are{rest}; raise --adapter-memory",
                param="adapter_memory",
            )

    def reserve(self, layout: Layout) -> Placement | None:
        """A slot and pages for an adapter, or None when there is no room now."""
        need = self._need(layout)
        if not self._free_slots or any(n > len(self._pools[w].free) for w, n in need.items()):
            return None
        a_pages, b_pages = {}, {}
        for path, rank in layout.ranks.items():
            site = self._base.sites[path]
            a_pages[path] = self._pools[site.in_features].take(rank)
            b_pages[path] = self._pools[site.out_features].take(rank)
        placement = Placement(self._free_slots.pop(), layout, a_pages, b_pages)
        self._placed[placement.slot] = placement
        return placement

    def upload(self, placement: Placement, adapter: CompiledAdapter) -> None:
        """Copy the adapter's tensors to their pages; returns when they are there. Any thread."""
        if self._stream is None:
            self._write(placement, adapter)
            return
        with torch.cuda.stream(self._stream):
            self._write(placement, adapter)
        self._stream.synchronize()

    def _write(self, placement: Placement, adapter: CompiledAdapter) -> None:
        for path, forms in adapter.sites.items():
            if forms.low_rank:
                site = self._base.sites[path]
                self._pools[site.in_features].write(placement.a_pages[path], forms.low_rank.a)
                self._pools[site.out_features].write(placement.b_pages[path], forms.low_rank.b.T)

    def publish(self, placement: Placement, adapter: CompiledAdapter) -> None:
        """Let the kernels see an uploaded adapter under its slot."""
        slot = placement.slot
        self.generations[slot] += 1
        for path, rank in placement.layout.ranks.items():
            self._tables[path].set(slot, rank, placement.a_pages[path], placement.b_pages[path])
        for path in placement.layout.biases:
            bias = adapter.sites[path].bias
            assert bias is not None, "the layout says there is one"
            self._set_bias(path, slot, bias)

    def _set_bias(self, path: str, slot: int, bias: torch.Tensor) -> None:
        tables = self._tables[path]
        if tables.bias is None:
            tables.bias = torch.zeros(self.num_slots, len(bias), dtype=self.dtype, device=self.device)
        tables.bias[slot] = bias.to(tables.bias)
        tables.biased.add(slot)

    def free(self, placement: Placement) -> None:
        """Give back a slot and its pages, published or not."""
        slot = placement.slot
        self.generations[slot] += 1
        for path in placement.layout.ranks:
            site = self._base.sites[path]
            self._pools[site.in_features].free.extend(placement.a_pages[path])
            self._pools[site.out_features].free.extend(placement.b_pages[path])
            self._tables[path].set(slot, 0, [], [])
        for path in placement.layout.biases:
            self._clear_bias(path, slot)
        del self._placed[slot]
        self._free_slots.append(slot)

    def _clear_bias(self, path: str, slot: int) -> None:
        tables = self._tables[path]
        tables.biased.discard(slot)
        if not tables.biased:
            tables.bias = None
        elif tables.bias is not None:
            tables.bias[slot] = 0

    def pages(self, path: str) -> RankPages:
        """The page tables of a site, for the kernels."""
        return self._tables[path].pages

    def ranks(self, path: str) -> list[int]:
        """True rank at a site by slot, on the host; 0 where a slot has none."""
        return self._tables[path].ranks

    def bias(self, path: str) -> torch.Tensor | None:
        """``[num_slots, out]`` biases of a site, zero where a slot has none; None while no adapter has one here."""
        return self._tables[path].bias

    def _need(self, layout: Layout) -> Counter[int]:
        """Pages by width."""
        need = Counter[int]()
        for path, rank in layout.ranks.items():
            site = self._base.sites[path]
            need[site.in_features] += _page_count(rank)
            need[site.out_features] += _page_count(rank)
        return need

    def _nbytes(self, pages: Counter[int]) -> int:
        return sum(width * count for width, count in pages.items()) * RANK_PAGE * self.dtype.itemsize

    def check_integrity(self) -> None:
        """Every page is free or placed, once.

        Raises:
            AssertionError: naming the width.
        """
        placed: dict[int, list[int]] = {width: [] for width in self._pools}
        for placement in self._placed.values():
            for path in placement.layout.ranks:
                site = self._base.sites[path]
                placed[site.in_features] += placement.a_pages[path]
                placed[site.out_features] += placement.b_pages[path]
        for width, pool in self._pools.items():
            held = sorted(placed[width] + pool.free)
            assert held == list(range(self.capacity[width])), f"pages of width {width} are lost or held twice"
        slots = sorted([*self._placed, *self._free_slots])
        assert slots == list(range(self.num_slots)), "slots are lost or held twice"


def _page_count(rank: int) -> int:
    return -(-rank // RANK_PAGE)
