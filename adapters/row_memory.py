"""The memory that adapters' tensors lie in on the device: rows in pools, one pool for each width.

A low-rank factor is as many rows as its rank, a gain or a bias one row. All sites of one width share a pool, so an
adapter takes what its own tensors need: rank 8 beside rank 128 costs rank 8, and a site an adapter does not touch costs
nothing (S-LoRA's unified paging with pages of one row, by width).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from weft.adapters.base import Base
from weft.adapters.free_rows import FreeRows
from weft.adapters.layout import Layout, Place, capacity_of
from weft.adapters.parts import Part

Rows = Mapping[Place, list[int]]
"""Rows in the pool of each place."""


class _Pool:
    """Rows of one width: ``[num_rows, width]`` and which of them are free."""

    def __init__(self, width: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.empty(num_rows, width, dtype=dtype, device=device)
        self.free = FreeRows(num_rows)

    def write(self, where: list[int], rows: torch.Tensor) -> None:
        """Copy ``rows`` ``[len(where), width]`` to their places."""
        index = torch.tensor(where).to(self.rows.device, non_blocking=True)
        self.rows.index_copy_(0, index, rows.to(self.rows, non_blocking=True))


class RowMemory:
    """Pools of rows for the modules of a base.

    Args:
        nbytes: for rows, split between the widths as low-rank updates of every linear would use them; where the base
            has experts, half of it as updates of all of them would.

    Raises:
        ValueError: ``nbytes`` do not hold one rank for every site.
    """

    def __init__(self, base: Base, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._capacity = capacity_of(base, nbytes, dtype)
        self._base = base
        self._itemsize = dtype.itemsize
        self._pools = {width: _Pool(width, count, dtype, device) for width, count in self._capacity.items()}

    @property
    def nbytes_total(self) -> int:
        return self.nbytes(self._capacity)

    @property
    def nbytes_used(self) -> int:
        return self.nbytes({width: self._capacity[width] - len(pool.free) for width, pool in self._pools.items()})

    def nbytes(self, rows: Mapping[int, int]) -> int:
        """Of so many rows of each width."""
        return sum(width * count for width, count in rows.items()) * self._itemsize

    def need(self, layout: Layout) -> Counter[int]:
        """The rows an adapter takes, by width."""
        need = Counter[int]()
        for place, count in layout.rows.items():
            need[self._width(place)] += count
        return need

    def holds(self, rows: Mapping[int, int]) -> bool:
        """Whether there are so many rows of each width, free or not."""
        return all(count <= self._capacity[width] for width, count in rows.items())

    def take(self, layout: Layout) -> Rows | None:
        """Rows for an adapter, or None where too few are free."""
        if any(count > len(self._pools[width].free) for width, count in self.need(layout).items()):
            return None
        return {place: self._pools[self._width(place)].free.take(count) for place, count in layout.rows.items()}

    def give_back(self, taken: Rows) -> None:
        """Rows that were taken."""
        for width, rows in self._by_width([taken]).items():
            self._pools[width].free.give_back(rows)

    def write(self, place: Place, where: list[int], rows: torch.Tensor) -> None:
        """Copy ``rows`` ``[len(where), width]`` to those of a place."""
        self._pools[self._width(place)].write(where, rows)

    def storage(self, place: Place) -> torch.Tensor:
        """All rows of the pool that those of a place are in, ``[rows, width]``."""
        return self._pools[self._width(place)].rows

    def of_width(self, width: int) -> torch.Tensor:
        """All rows of a width."""
        return self._pools[width].rows

    def _width(self, place: Place) -> int:
        path, part = place
        if self._base.is_layer(path):
            return self._base.hidden_size
        site = self._base.module(path)
        assert site is not None, f"{path} is not a module of the base that adapters attach to"
        if part in (Part.KEYS, Part.VALUES_IN, Part.VALUES_OUT, Part.VALUES_JOINT):
            return self._base.kv_heads * self._base.head_dim
        if site.kind == "embedding" and part in (Part.ROWS, Part.ROTATE_IN):  # of the vectors it gives out
            return site.out_features
        return site.in_features if part.of_input or part is Part.ROWS else site.out_features

    def _by_width(self, taken: Iterable[Rows]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {width: [] for width in self._pools}
        for rows_of in taken:
            for place, rows in rows_of.items():
                found[self._width(place)] += rows
        return found

    def check_integrity(self, taken: Iterable[Rows]) -> None:
        """Every row is free or among ``taken``, once.

        Raises:
            AssertionError: a row is lost or held twice.
        """
        for width, rows in self._by_width(taken).items():
            self._pools[width].free.check_tiles(rows)
