"""Grouped delta on a GPU: one launch, a program for each tile of rows and block of outputs."""

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
def delta_kernel(
    y,
    x,
    delta,
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
    """y[order[i], n] += D[slot][n] . x[order[i]] for a tile of rows and a block of outputs."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    outputs = tl.load(counts + slot, mask=length > 0, other=0)
    if outputs == 0:
        return
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    at = tl.load(table + slot * table_stride + n, mask=inside, other=0).to(tl.int64) * width
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k_at in range(0, width, BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        within = k < width
        x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & within[None, :], other=0.0)
        d_block = tl.load(delta + at[None, :] + k[:, None], mask=inside[None, :] & within[:, None], other=0.0)
        acc = tl.dot(x_block, d_block, acc, input_precision="ieee")
    to = y + row[:, None] * y_stride + n[None, :]
    touched = live[:, None] & inside[None, :]
    tl.store(to, (tl.load(to, mask=touched, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=touched)


def grouped_delta(y: Tensor, x: Tensor, delta: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_delta.grouped_delta`."""
    if not groups.active or delta.max_count == 0:
        return
    config = delta_config(x.dtype, groups.block_rows)
    delta_kernel[(groups.num_tiles, triton.cdiv(delta.max_count, config["BLOCK_N"]))](
        y,
        x,
        delta.pool,
        delta.table,
        delta.counts,
        groups.order,
        groups.tiles,
        delta.width,
        x.stride(0),
        y.stride(0),
        delta.table.stride(0),
        **config,
    )


def delta_config(dtype: torch.dtype, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    wide = 128 // dtype.itemsize  # fp32 products in blocks of 64 outputs spill
    return {"BLOCK_M": block_rows, "BLOCK_N": wide, "BLOCK_K": 2 * wide, "num_warps": 4, "num_stages": 3}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    for dtype, rows in (("bf16", 16), ("bf16", 32), ("fp16", 16), ("fp32", 16)):
        config = delta_config(DTYPES[dtype], rows)
        yield Variant(f"delta rows {rows}", delta_kernel, dtype, config, {"delta": VALUES})
