"""Grouped delta: every row of a batch gets the dense update of its own adapter.

*Semantics*, for every row t whose slot s is not -1 and has a delta at the site:

    y[t] += D[s] x[t]

Sums are in fp32, rounded once to y's dtype. Rows of slot -1 and rows whose slot has none are left as they are, bit for
bit.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["grouped_delta"]


def grouped_delta(y: Tensor, x: Tensor, delta: SlotRows, groups: RowGroups) -> None:
    """Adds to each row of y, in place, the dense update of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        delta: `out` rows of width in for a slot that has an update, of the same dtype.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    shapes = (groups.num_rows, delta.width) == tuple(x.shape) and groups.num_rows == y.shape[0]
    if not shapes or not set(delta.host_counts) <= {0, y.shape[1]}:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {groups.num_rows} rows and updates of "
            f"{sorted(set(delta.host_counts))} rows of {delta.width}"
        )
    if not x.dtype == y.dtype == delta.pool.dtype:
        raise ValueError(f"x {x.dtype}, y {y.dtype}, delta {delta.pool.dtype}: dtypes must be equal")
    if not groups.active:
        return
    if backend(y) == "triton":
        from .triton import grouped_delta as launch

        launch(y, x, delta, groups)
        return
    for slot in groups.active:
        if delta.host_counts[slot]:
            rows = groups.rows_of((slot,))
            if isinstance(rows, slice):
                y[rows].addmm_(x[rows], delta.of(slot).T)
            else:
                assert rows is not None, "an active slot has rows"
                y.index_copy_(0, rows, torch.addmm(y[rows], x[rows], delta.of(slot).T))
