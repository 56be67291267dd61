"""The meaning of the grouped turn: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_turn(y: Tensor, turn: SlotRows, distances: Tensor, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_turn.grouped_turn`."""
    for slot, start, stop in groups.segments:
        if turn.host_counts[slot]:
            rows = groups.order[start:stop].long()
            own, other = turn.of(slot).float()
            value = y[rows].float()
            partner = value.view(len(rows), -1, 2, int(distances[slot])).flip(2).view_as(value)
            y[rows] = (value + own * value + other * partner).to(y.dtype)
