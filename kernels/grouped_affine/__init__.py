"""Grouped affine: every row of a batch is scaled and shifted, element by element, as its own adapter says.

*Semantics*, for every row t whose slot s is not -1, each step where the slot has such a row, rounded to y's dtype:

    y[t] = gain[s] * y[t]
    y[t] = y[t] + shift[s]

Rows of slot -1 and rows whose slot has neither are left as they are, bit for bit.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["grouped_affine"]


def grouped_affine(y: Tensor, gain: SlotRows | None, shift: SlotRows | None, groups: RowGroups) -> None:
    """Scales and shifts the rows of y in place.

    Args:
        y: [T, width] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        gain: one row, or none, per slot, of y's width and dtype; None where no slot has one.
        shift: likewise.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    for rows in (gain, shift):
        if rows is not None and (rows.width, rows.pool.dtype) != (y.shape[1], y.dtype):
            raise ValueError(f"y {tuple(y.shape)} {y.dtype} does not fit rows of {rows.width} {rows.pool.dtype}")
    if y.shape[0] != groups.num_rows:
        raise ValueError(f"y has {y.shape[0]} rows, the groups have {groups.num_rows}")
    if not groups.active:
        return
    if backend(y) == "triton":
        from .triton import grouped_affine as launch

        launch(y, gain, shift, groups)
        return
    for rows, apply in ((gain, torch.Tensor.mul_), (shift, torch.Tensor.add_)):
        if rows is not None:
            _apply(y, rows, apply, groups)


def _apply(y: Tensor, rows: SlotRows, apply, groups: RowGroups) -> None:  # type: ignore[no-untyped-def]
    chosen = groups.rows_of(tuple(slot for slot in groups.active if rows.host_counts[slot]))
    if chosen is None:
        return
    values = rows.pool.index_select(0, rows.table[groups.slots[chosen].long(), 0].long())
    if isinstance(chosen, slice):
        apply(y[chosen], values)
    else:
        y.index_copy_(0, chosen, apply(y.index_select(0, chosen), values))
