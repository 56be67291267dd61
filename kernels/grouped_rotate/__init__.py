"""Grouped rotate: every row of a batch is multiplied, block by block, by the rotation of its own adapter.

*Semantics*, for every row t whose slot s is not -1 and has a rotation of blocks of size g (the count of its rows), with
b(n) = g * (n // g) the start of n's block:

    y[t, n] += sum over i < g of x[t, b(n) + i] * rotation[s][i, n]

so that y, at first a copy of x, becomes x R where R - 1 is block-diagonal: row i has, at column n, the block's element
(i, n - b(n)). What is kept is R - 1 because 16 bits hold a small rotation better that way. Sums are in fp32, rounded
once to y's dtype. Rows of slot -1 and rows whose slot has none are left as they are, bit for bit.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["grouped_rotate"]


def grouped_rotate(y: Tensor, x: Tensor, rotation: SlotRows, groups: RowGroups) -> None:
    """Adds to each row of y, in place, the row of x times what the rotation of the row's slot has beside 1.

    Args:
        y: [T, width] fp32, bf16 or fp16; rows may be strided, a row is contiguous. Shares no memory with x.
        x: likewise, of the same dtype.
        rotation: for a slot that has one, as many rows of that width as its blocks are wide, of the same dtype.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    shape = (groups.num_rows, rotation.width)
    if not shape == tuple(x.shape) == tuple(y.shape) or any(n and rotation.width % n for n in rotation.host_counts):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {groups.num_rows} rows and rotations of "
            f"{sorted(set(rotation.host_counts))} rows of {rotation.width}"
        )
    if not x.dtype == y.dtype == rotation.pool.dtype:
        raise ValueError(f"x {x.dtype}, y {y.dtype}, rotation {rotation.pool.dtype}: dtypes must be equal")
    if not groups.active:
        return
    if backend(y) == "triton":
        from .triton import grouped_rotate as launch

        launch(y, x, rotation, groups)
        return
    for slot in groups.active:
        if rotation.host_counts[slot]:
            rows = groups.rows_of((slot,))
            assert rows is not None, "an active slot has rows"
            turned = _blockwise(x[rows], rotation.of(slot))
            if isinstance(rows, slice):
                y[rows] += turned
            else:
                y.index_add_(0, rows, turned)


def _blockwise(x: Tensor, rotation: Tensor) -> Tensor:
    """x times the block-diagonal matrix, as one batch of products."""
    size = rotation.shape[0]
    blocks = rotation.view(size, -1, size).transpose(0, 1)
    by_block = x.reshape(x.shape[0], -1, size).transpose(0, 1)
    return torch.bmm(by_block, blocks).transpose(0, 1).reshape(x.shape)
