"""What adapters keep on the device: rows in pools that all sites of one width share, found through a table by slot.

A low-rank factor is `rank` rows, a gain or a bias one row, a dense update as many rows as the site has outputs. An
adapter holds exactly the rows its tensors have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotRows:
    """The rows every slot has of one kind at one site.

    Attributes:
        pool: [pool rows, width]. Rows that belong to no slot may hold anything: they are never read.
        table: int32 [slots, max_count or more]; row j of a slot is `pool[table[slot, j]]` for j below its count. The
            places of one slot ascend.
        counts: int32 [slots] on the device, 0 where a slot has nothing.
        host_counts: the same on the host.
    """

    pool: Tensor
    table: Tensor
    counts: Tensor
    host_counts: tuple[int, ...]

    @property
    def max_count(self) -> int:
        """The most rows a slot has."""
        return max(self.host_counts, default=0)

    @property
    def width(self) -> int:
        return self.pool.shape[1]

    def used_by(self, slots: Sequence[int]) -> bool:
        """Whether any of the slots has rows."""
        return any(self.host_counts[slot] for slot in slots)

    def of(self, slot: int) -> Tensor:
        """One slot's rows, [count, width]; a view of the pool where they are adjacent. Waits for the device."""
        count = self.host_counts[slot]
        places = self.table[slot, :count].tolist()
        if places and places[-1] - places[0] + 1 == count:
            return self.pool[places[0] : places[0] + count]
        return self.pool.index_select(0, self.table[slot, :count].long())

    def gather(self, slots: Sequence[int]) -> Tensor:
        """The rows of several slots, one slot's after the other's, copied."""
        index = torch.tensor(slots, dtype=torch.long, device=self.table.device)
        used = torch.arange(self.table.shape[1], device=self.table.device) < self.counts[index, None]
        return self.pool.index_select(0, self.table[index][used].long())
