"""Grouped sparse: every row of a batch gets the sparse update of its own adapter.

*Semantics*, for every row t whose slot s is not -1 and has an update S, zero but for few values:

    y[t] += S[s] x[t]

Sums are in fp32, rounded once to y's dtype. Rows of slot -1 and rows whose slot has none are left as they are, bit for
bit.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.sparse_rows import unpack_rows

__all__ = ["grouped_sparse"]


def grouped_sparse(y: Tensor, x: Tensor, sparse: SlotRows, groups: RowGroups) -> None:
    """Adds to each row of y, in place, the sparse update of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        sparse: rows of width in, as `pack_rows` makes them for `out` outputs, of the same dtype; in times its size is
            a multiple of 4.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if (groups.num_rows, sparse.width) != tuple(x.shape) or groups.num_rows != y.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {groups.num_rows} rows and updates of {sparse.width}"
        )
    if not x.dtype == y.dtype == sparse.pool.dtype:
        raise ValueError(f"x {x.dtype}, y {y.dtype}, sparse {sparse.pool.dtype}: dtypes must be equal")
    if sparse.width * sparse.pool.element_size() % 4:
        raise ValueError(f"rows of {sparse.width} {sparse.pool.dtype} hold no whole number of int32")
    if not groups.active:
        return
    if backend(y) == "triton":
        from .triton import grouped_sparse as launch

        launch(y, x, sparse, groups)
        return
    for slot in groups.active:
        if sparse.host_counts[slot]:
            rows = groups.rows_of((slot,))
            assert rows is not None, "an active slot has rows"
            update = _product(x[rows], sparse.of(slot), y.shape[1])
            if isinstance(rows, slice):
                y[rows] += update
            else:
                y.index_add_(0, rows, update)


def _product(x: Tensor, rows: Tensor, outputs: int) -> Tensor:
    """S x for each row of x. An output is a bag of x's elements, weighted and summed, which torch has a kernel for."""
    starts, columns, values = unpack_rows(rows, outputs)
    # That kernel works on vectors; eight elements take it no longer than one, and half as long in bf16.
    elements = torch.nn.functional.pad(x, (0, 0, 0, max(0, 8 - len(x)))).T.contiguous()
    summed = torch.nn.functional.embedding_bag(
        columns, elements, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    return summed[:, : len(x)].T
