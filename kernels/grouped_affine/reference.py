"""The meaning of the grouped affine: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_affine(y: Tensor, gain: SlotRows | None, shift: SlotRows | None, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_affine.grouped_affine`."""
    for slot, start, stop in groups.segments:
        rows = groups.order[start:stop].long()
        if gain is not None and gain.host_counts[slot]:
            y[rows] = (y[rows].float() * gain.of(slot).float()).to(y.dtype)
        if shift is not None and shift.host_counts[slot]:
            y[rows] = (y[rows].float() + shift.of(slot).float()).to(y.dtype)
