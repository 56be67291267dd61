"""Grouped rotate on a GPU: one launch, a program for each tile of rows and block of columns.

A program multiplies the columns of x that its own columns depend on, which are those of the rotation's blocks it
touches, by the elements of these blocks and zeros between them: whatever the size of a rotation's blocks, a product of
tiles.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import DTYPES, VALUES, Variant


@triton.jit
def rotate_kernel(
    y,
    x,
    rotation,
    table,
    counts,
    order,
    tiles,
    width,
    x_stride,
    y_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[order[i], n] += x[order[i], block of n] . rotation[slot][:, n] for a tile of rows and a block of columns."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    size = tl.load(counts + slot, mask=length > 0, other=0)
    if size == 0:
        return
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    n_from = tl.program_id(1) * BLOCK_N
    n = n_from + tl.arange(0, BLOCK_N)
    inside = n < width
    k_to = tl.minimum((n_from + BLOCK_N - 1) // size * size + size, width)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k_at in range(n_from // size * size, k_to, BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        within = k < k_to
        x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & within[None, :], other=0.0)
        at = tl.load(table + slot * table_stride + k % size).to(tl.int64) * width
        one_block = (k[:, None] // size == n[None, :] // size) & inside[None, :]
        r_block = tl.load(rotation + at[:, None] + n[None, :], mask=one_block, other=0.0)
        acc = tl.dot(x_block, r_block, acc, input_precision="ieee")
    to = y + row[:, None] * y_stride + n[None, :]
    touched = live[:, None] & inside[None, :]
    tl.store(to, (tl.load(to, mask=touched, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=touched)


def grouped_rotate(y: Tensor, x: Tensor, rotation: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_rotate.grouped_rotate`."""
    if not groups.active or rotation.max_count == 0:
        return
    config = rotate_config(x.dtype, groups.block_rows)
    rotate_kernel[(groups.num_tiles, triton.cdiv(rotation.width, config["BLOCK_N"]))](
        y,
        x,
        rotation.pool,
        rotation.table,
        rotation.counts,
        groups.order,
        groups.tiles,
        rotation.width,
        x.stride(0),
        y.stride(0),
        rotation.table.stride(0),
        **config,
    )


def rotate_config(dtype: torch.dtype, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    wide = 128 // dtype.itemsize
    return {"BLOCK_M": block_rows, "BLOCK_N": wide, "BLOCK_K": wide, "num_warps": 4, "num_stages": 3}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    for dtype, rows in (("bf16", 16), ("bf16", 32), ("fp16", 16), ("fp32", 16)):
        config = rotate_config(DTYPES[dtype], rows)
        yield Variant(f"rotate rows {rows}", rotate_kernel, dtype, config, {"rotation": VALUES})
