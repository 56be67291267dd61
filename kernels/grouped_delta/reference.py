"""The meaning of the grouped delta: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_delta(y: Tensor, x: Tensor, delta: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_delta.grouped_delta`."""
    for slot, start, stop in groups.segments:
        if delta.host_counts[slot]:
            rows = groups.order[start:stop].long()
            y[rows] = (y[rows].float() + x[rows].float() @ delta.of(slot).float().T).to(y.dtype)
