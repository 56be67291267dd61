"""Grouped sparse on a GPU: one launch, a program for each tile of rows and block of outputs.

A program goes through the values of its outputs a few at a time, all outputs side by side, up to the longest: no
atomics, the same result on every run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import INTEGERS, VALUES, Variant


@triton.jit
def element(pool, rows, first, index, width, mask):
    """Element `index` of what lies from a slot's row `first` on; `rows` is the slot's row of the table."""
    at = tl.load(rows + first + index // width, mask=mask, other=0).to(tl.int64) * width
    return tl.load(pool + at + index % width, mask=mask, other=0)


@triton.jit
def sparse_kernel(
    y,
    x,
    sparse,
    integers,
    table,
    counts,
    order,
    tiles,
    width,
    integers_width,
    outputs,
    x_stride,
    y_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[order[i], n] += S[slot][n] . x[order[i]] for a tile of rows and a block of outputs.

    `integers` is the memory of `sparse` read as int32, of which a row has `integers_width`.
    """
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    if tl.load(counts + slot, mask=length > 0, other=0) == 0:
        return
    rows = table + slot * table_stride
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    begin = element(integers, rows, 0, n, integers_width, inside)
    count = element(integers, rows, 0, n + 1, integers_width, inside) - begin
    total = element(integers, rows, 0, outputs, integers_width, True)
    columns_from = tl.cdiv(outputs + 1, integers_width)
    values_from = columns_from + tl.cdiv(total, integers_width)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k_at in range(0, tl.max(count, 0), BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        there = k[None, :] < count[:, None]
        index = begin[:, None] + k[None, :]
        column = element(integers, rows, columns_from, index, integers_width, there)
        value = element(sparse, rows, values_from, index, width, there).to(tl.float32)
        x_block = tl.load(
            x + row[:, None, None] * x_stride + column[None, :, :],
            mask=live[:, None, None] & there[None, :, :],
            other=0.0,
        )
        acc += tl.sum(x_block.to(tl.float32) * value[None, :, :], 2)
    to = y + row[:, None] * y_stride + n[None, :]
    touched = live[:, None] & inside[None, :]
    tl.store(to, (tl.load(to, mask=touched, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=touched)


def grouped_sparse(y: Tensor, x: Tensor, sparse: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_sparse.grouped_sparse`."""
    if not groups.active or sparse.max_count == 0:
        return
    config = sparse_config(groups.block_rows)
    integers = sparse.pool.view(torch.int32)
    sparse_kernel[(groups.num_tiles, triton.cdiv(y.shape[1], config["BLOCK_N"]))](
        y,
        x,
        sparse.pool,
        integers,
        sparse.table,
        sparse.counts,
        groups.order,
        groups.tiles,
        sparse.width,
        integers.shape[1],
        y.shape[1],
        x.stride(0),
        y.stride(0),
        sparse.table.stride(0),
        **config,
    )


def sparse_config(block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options: 4096 products at a time."""
    return {"BLOCK_M": block_rows, "BLOCK_N": 16, "BLOCK_K": 256 // block_rows, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"sparse": VALUES, "integers": INTEGERS}
    for dtype, rows in (("bf16", 16), ("bf16", 32), ("fp16", 16), ("fp32", 16)):
        yield Variant(f"sparse rows {rows}", sparse_kernel, dtype, sparse_config(rows), arguments)
