"""Grouped turn: pairs of elements of every row are turned and stretched as the row's own adapter says.

*Semantics*, for every row t whose slot s is not -1 and has a turn with pairs of distance d, where n's partner p(n) is
n + d in the first half of a group of 2 d elements and n - d in the second:

    y[t, n] = y[t, n] + turn[s][0, n] * y[t, n] + turn[s][1, n] * y[t, p(n)]

The first row has what the factor of y[t, n] has beside 1, because 16 bits hold that better. Sums are in fp32, rounded
once to y's dtype. Rows of slot -1 and rows whose slot has none are left as they are, bit for bit.
"""

from itertools import groupby

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["grouped_turn"]


def grouped_turn(y: Tensor, turn: SlotRows, distances: Tensor, groups: RowGroups) -> None:
    """Turns the rows of y in place.

    Args:
        y: [T, width] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        turn: two rows, or none, per slot, of y's width and dtype.
        distances: int32 [slots], of y's device; where a slot has rows, twice the distance divides the width.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if (turn.width, turn.pool.dtype) != (y.shape[1], y.dtype) or not set(turn.host_counts) <= {0, 2}:
        raise ValueError(
            f"y {tuple(y.shape)} {y.dtype} does not fit turns of {sorted(set(turn.host_counts))} rows of {turn.width} "
            f"{turn.pool.dtype}"
        )
    if y.shape[0] != groups.num_rows or distances.shape[0] != len(turn.host_counts):
        raise ValueError(
            f"y has {y.shape[0]} rows, the groups have {groups.num_rows}; {distances.shape[0]} distances for "
            f"{len(turn.host_counts)} slots"
        )
    if not groups.active:
        return
    if backend(y) == "triton":
        from .triton import grouped_turn as launch

        launch(y, turn, distances, groups)
        return
    by_slot = distances.tolist()
    slots = sorted((slot for slot in groups.active if turn.host_counts[slot]), key=by_slot.__getitem__)
    for distance, alike in groupby(slots, by_slot.__getitem__):
        _turn(y, turn, distance, groups.rows_of(tuple(alike)), groups)


def _turn(y: Tensor, turn: SlotRows, distance: int, chosen: Tensor | slice | None, groups: RowGroups) -> None:
    """Turns the chosen rows, all by pairs of one distance, in fp32."""
    assert chosen is not None, "an active slot has rows"
    places = turn.table[groups.slots[chosen].long(), :2]
    own, other = turn.pool.index_select(0, places.T.flatten()).view(2, len(places), -1).float()
    value = y[chosen].float()
    partner = value.view(len(value), -1, 2, distance).flip(2).view_as(value)
    turned = torch.addcmul(value + own * value, other, partner).to(y.dtype)
    if isinstance(chosen, slice):
        y[chosen] = turned
    else:
        y.index_copy_(0, chosen, turned)
