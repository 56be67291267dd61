"""Grouped affine on a GPU: one launch, a program for each row that has an adapter and block of columns."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import DTYPES, INTEGERS, VALUES, Variant


@triton.jit
def affine_kernel(
    y,
    order,
    slots,
    gain,
    gain_table,
    gain_counts,
    gain_table_stride,
    shift,
    shift_table,
    shift_counts,
    shift_table_stride,
    width,
    y_stride,
    HAS_GAIN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[row] = gain[slot] * y[row] + shift[slot] over one block of columns."""
    row = tl.load(order + tl.program_id(0)).to(tl.int64)
    if row < 0:  # the order of a captured step is filled up
        return
    slot = tl.load(slots + row)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    value = tl.load(y + row * y_stride + n, mask=inside, other=0.0)
    # Nested, because what HAS_* rules out must not even be compiled.
    if HAS_GAIN:  # noqa: SIM102
        if tl.load(gain_counts + slot) > 0:
            at = tl.load(gain_table + slot * gain_table_stride).to(tl.int64) * width
            factor = tl.load(gain + at + n, mask=inside, other=0.0)
            value = (value.to(tl.float32) * factor.to(tl.float32)).to(y.dtype.element_ty)
    if HAS_SHIFT:  # noqa: SIM102
        if tl.load(shift_counts + slot) > 0:
            at = tl.load(shift_table + slot * shift_table_stride).to(tl.int64) * width
            term = tl.load(shift + at + n, mask=inside, other=0.0)
            value = (value.to(tl.float32) + term.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + n, value, mask=inside)


def grouped_affine(y: Tensor, gain: SlotRows | None, shift: SlotRows | None, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_affine.grouped_affine`."""
    if not groups.active or (gain is None and shift is None):
        return
    config = affine_config(y.dtype)
    affine_kernel[(groups.num_adapted, triton.cdiv(y.shape[1], config["BLOCK_N"]))](
        y,
        groups.order,
        groups.slots,
        *_arguments(gain, groups),
        *_arguments(shift, groups),
        y.shape[1],
        y.stride(0),
        HAS_GAIN=gain is not None,
        HAS_SHIFT=shift is not None,
        **config,
    )


def affine_config(dtype: torch.dtype) -> dict[str, Any]:
    """Block size and launch options."""
    return {"BLOCK_N": 4096 // dtype.itemsize, "num_warps": 4}


def _arguments(rows: SlotRows | None, groups: RowGroups) -> tuple[Any, ...]:
    """Pool, table, counts and the table's stride; of something never read where there are no rows."""
    if rows is None:
        return groups.order, groups.order, groups.order, 0
    return rows.pool, rows.table, rows.counts, rows.table.stride(0)


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    tables = dict.fromkeys(("gain_table", "gain_counts", "shift_table", "shift_counts"), INTEGERS)
    arguments = {"gain": VALUES, "shift": VALUES, **tables}
    for dtype in DTYPES:
        config = affine_config(DTYPES[dtype]) | {"HAS_GAIN": True, "HAS_SHIFT": True}
        yield Variant("affine", affine_kernel, dtype, config, arguments)
