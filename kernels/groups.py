"""Rows of a batch grouped by the slot of their adapter: the metadata of every grouped op, built once per step."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows of one flat batch, grouped by slot. Slot -1 is the base: such a row belongs to no group.

    Attributes:
        slots: int32 [num_rows] on the device, the slot of each row.
        order: int32 [num_adapted] on the device, rows with an adapter, sorted by slot, ascending within a slot.
            Behind them there may be -1, and behind the tiles such of length 0: filling of captured steps, of which
            kernels take no notice.
        tiles: int32 [num_tiles, 3] on the device, (slot, start in `order`, length <= block_rows). No tile spans two
            slots, none is empty.
        segments: on the host, (slot, start, stop) in `order` of every slot that has rows, ascending.
        active: on the host, the distinct slots, ascending.
        num_rows: rows of the batch, base rows included.
        block_rows: the most rows of a tile.
    """

    slots: Tensor
    order: Tensor
    tiles: Tensor
    segments: tuple[tuple[int, int, int], ...]
    active: tuple[int, ...]
    num_rows: int
    block_rows: int
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, slots: Sequence[int], device: torch.device | str, *, block_rows: int = 16) -> "RowGroups":
        """Groups rows by `slots` (one per row, -1 for the base) on the host; one asynchronous copy to `device`.

        Raises:
            ValueError: a slot below -1, or `block_rows` not 16 or 32.
        """
        if block_rows not in (16, 32):
            raise ValueError(f"block_rows is {block_rows}: kernels are written for tiles of 16 or 32 rows")
        host = np.asarray(slots, dtype=np.int32)
        if host.size and host.min() < -1:
            raise ValueError(f"slots holds {host.min()}: a slot is -1 (base) or a non-negative index")
        order = np.argsort(host, kind="stable").astype(np.int32)
        by_slot = host[order]
        first = int(np.searchsorted(by_slot, 0))
        order, by_slot = order[first:], by_slot[first:]
        segments = _segments(by_slot)
        tiles = [
            (slot, at, min(block_rows, stop - at))
            for slot, start, stop in segments
            for at in range(start, stop, block_rows)
        ]
        packed = np.concatenate([host, order, np.asarray(tiles, dtype=np.int32).ravel()])
        moved = to_device(packed, device)
        sizes = [len(host), len(order), 3 * len(tiles)]
        slots_d, order_d, tiles_d = moved.split(sizes)
        active = tuple(slot for slot, _, _ in segments)
        return cls(slots_d, order_d, tiles_d.view(-1, 3), segments, active, len(host), block_rows)

    @property
    def num_adapted(self) -> int:
        """Rows that have an adapter."""
        return self.order.shape[0]

    @property
    def num_tiles(self) -> int:
        """Tiles of all slots together: the grid of a grouped kernel."""
        return self.tiles.shape[0]

    def rows_of(self, slots: tuple[int, ...]) -> Tensor | slice | None:
        """The rows of some of the active slots, ascending; a slice where they are adjacent, None where there are none.

        Waits for the device: for the CPU paths.
        """
        return self.plan(("rows", slots), lambda: self._rows_of(frozenset(slots)))

    def _rows_of(self, slots: frozenset[int]) -> Tensor | slice | None:
        parts = [self.order[start:stop] for slot, start, stop in self.segments if slot in slots]
        if not parts:
            return None
        rows = torch.cat(parts).long().sort().values
        first, last = int(rows[0]), int(rows[-1])
        return slice(first, last + 1) if last - first + 1 == len(rows) else rows

    def plan(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returned for `key` this step: sites that need the same plan share one."""
        if key not in self._plans:
            self._plans[key] = build()
        plan: T = self._plans[key]
        return plan


def to_device(host: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """Copies a host array to `device` without waiting for the device."""
    tensor = torch.from_numpy(host)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _segments(by_slot: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal slots in a sorted array, as (slot, start, stop)."""
    if not by_slot.size:
        return ()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(by_slot)) + 1])
    stops = np.append(starts[1:], by_slot.size)
    return tuple(zip(by_slot[starts].tolist(), starts.tolist(), stops.tolist(), strict=True))
