"""The meaning of the grouped rotate: one slot after the other in fp32."""

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_rotate(y: Tensor, x: Tensor, rotation: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_rotate.grouped_rotate`."""
    for slot, start, stop in groups.segments:
        if rotation.host_counts[slot]:
            rows = groups.order[start:stop].long()
            blocks = rotation.of(slot).float().split(rotation.host_counts[slot], dim=1)
            y[rows] = (y[rows].float() + x[rows].float() @ torch.block_diag(*blocks)).to(y.dtype)
