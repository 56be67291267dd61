"""What adapters keep on the device: rows in pools that all sites of one width share, found through a table by slot.

A low-rank factor is `rank` rows, a gain or a bias one row, a dense update as many rows as the site has outputs. An
adapter holds exactly the rows its tensors have. Where a site has experts, every one of them has rows of its own.
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
            places of one slot ascend. With experts, entry `slot * experts + expert` takes the place of the slot's, and
            one entry more, the last, belongs to none.
        counts: int32, as many as `table` has entries, on the device; 0 where there is nothing, as in the last of them.
        host_counts: the same on the host by slot: what each of its experts has.
        experts: of the site; 0 where it has none.
    """

    pool: Tensor
    table: Tensor
    counts: Tensor
    host_counts: tuple[int, ...]
    experts: int = 0

    @property
    def max_count(self) -> int:
        """The most rows a slot, or an expert of one, has."""
        return max(self.host_counts, default=0)

    @property
    def padded_count(self) -> int:
        """A power of two that is no smaller: what launches are made for, so that they are the same for many counts."""
        return 1 << (self.max_count - 1).bit_length() if self.max_count else 0

    @property
    def width(self) -> int:
        return self.pool.shape[1]

    def used_by(self, slots: Sequence[int]) -> bool:
        """Whether any of the slots has rows."""
        return any(self.host_counts[slot] for slot in slots)

    def of(self, slot: int, expert: int = 0) -> Tensor:
        """One slot's rows, [count, width]; a view of the pool where they are adjacent. Waits for the device."""
        count = self.host_counts[slot]
        entry = self.table[slot * max(1, self.experts) + expert, :count]
        places = entry.tolist()
        if places and places[-1] - places[0] + 1 == count:
            return self.pool[places[0] : places[0] + count]
        return self.pool.index_select(0, entry.long())

    def gather(self, slots: Sequence[int]) -> Tensor:
        """The rows of several slots, one slot's after the other's, copied."""
        index = torch.tensor(slots, dtype=torch.long, device=self.table.device)
        used = torch.arange(self.table.shape[1], device=self.table.device) < self.counts[index, None]
        return self.pool.index_select(0, self.table[index][used].long())
