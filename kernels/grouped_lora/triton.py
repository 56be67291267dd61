"""Grouped LoRA on a GPU: two launches per site, shrink into fp32 planes and expand into y, or one where that pays.

A program serves one tile of `RowGroups.tiles`, so no program runs for a slot without rows. Loops end at the true rank.
The shrink splits its sum over programs (split-K) when tiles are few; each split writes a plane of its own, and expand
adds the planes in a fixed order: no atomics, no zero-fill, the same result on every run.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import DTYPES, FLOATS, INTEGERS, MULTIPLE, VALUES, Variant

from . import fused

# Enough programs to occupy the largest devices (132 to 304 multiprocessors); more splits only add planes to read.
TARGET_PROGRAMS = 256
MIN_SPLIT = 256


@triton.jit
def shrink_kernel(
    x,
    a,
    table,
    ranks,
    order,
    tiles,
    planes,
    width,
    split_width,
    num_adapted,
    max_rank,
    x_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """planes[split, i, :rank] = A[slot] x[order[i]] over one split of the columns, for the rows i of one tile."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    rank = tl.load(ranks + slot, mask=length > 0, other=0)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    k_from = split * split_width
    k_to = tl.minimum(k_from + split_width, width)
    out_row = (split * num_adapted + start + m).to(tl.int64) * max_rank
    for r_from in range(0, rank, BLOCK_R):
        r = r_from + tl.arange(0, BLOCK_R)
        ranked = r < rank
        a_row = tl.load(table + slot * table_stride + r, mask=ranked, other=0).to(tl.int64) * width
        acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for k_at in range(k_from, k_to, BLOCK_K):
            k = k_at + tl.arange(0, BLOCK_K)
            inside = k < k_to
            x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            a_block = tl.load(a + a_row[None, :] + k[:, None], mask=ranked[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(x_block, a_block, acc, input_precision="ieee")
        tl.store(planes + out_row[:, None] + r[None, :], acc, mask=live[:, None] & ranked[None, :])


@triton.jit
def expand_kernel(
    y,
    b,
    table,
    ranks,
    order,
    tiles,
    planes,
    width,
    num_splits,
    num_adapted,
    max_rank,
    y_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[order[i], n] += (sum over splits of planes[split, i]) . B[slot][:, n], for a tile of rows and of columns."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    rank = tl.load(ranks + slot, mask=length > 0, other=0)
    if rank == 0:  # y + 0 would turn -0.0 into 0.0
        return
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for r_from in range(0, rank, BLOCK_R):
        r = r_from + tl.arange(0, BLOCK_R)
        ranked = r < rank
        h = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for split in range(0, num_splits):
            h_row = (split * num_adapted + start + m).to(tl.int64) * max_rank
            h += tl.load(planes + h_row[:, None] + r[None, :], mask=live[:, None] & ranked[None, :], other=0.0)
        b_row = tl.load(table + slot * table_stride + r, mask=ranked, other=0).to(tl.int64) * width
        b_block = tl.load(b + b_row[:, None] + n[None, :], mask=ranked[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(h.to(b_block.dtype), b_block, acc, input_precision="ieee")
    at = y + row[:, None] * y_stride + n[None, :]
    touched = live[:, None] & inside[None, :]
    tl.store(at, (tl.load(at, mask=touched, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=touched)


def grouped_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`."""
    if not groups.active or a.max_count == 0:
        return
    if fused.one_launch_pays(groups.num_tiles, a.padded_count, a.width, x.dtype.itemsize):
        fused.grouped_lora(y, x, a, b, groups)
    else:
        expand(y, shrink(x, a, groups), b, groups)


def shrink(
    x: Tensor, a: SlotRows, groups: RowGroups, launch_in: AbstractContextManager[object] | None = None
) -> Tensor:
    """See `weft.kernels.grouped_lora.shrink`."""
    max_rank, (rows, width) = a.padded_count, (groups.num_adapted, x.shape[1])
    config = shrink_config(x.dtype, max_rank, groups.block_rows)
    split_width = split_width_of(width, max(1, groups.num_tiles), config["BLOCK_K"])
    splits = triton.cdiv(width, split_width)
    planes = torch.empty(splits, rows, max_rank, dtype=torch.float32, device=x.device)
    with launch_in or nullcontext():
        if planes.numel():
            shrink_kernel[(groups.num_tiles, splits)](
                *(x, a.pool, a.table, a.counts, groups.order, groups.tiles, planes),
                *(width, split_width, rows, max_rank, x.stride(0), a.table.stride(0)),
                **config,
            )
    return planes


def expand(y: Tensor, planes: Tensor, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.expand`."""
    splits, rows, max_rank = planes.shape
    if not planes.numel():
        return
    config = expand_config(y.dtype, max_rank, groups.block_rows)
    width = y.shape[1]
    expand_kernel[(groups.num_tiles, triton.cdiv(width, config["BLOCK_N"]))](
        *(y, b.pool, b.table, b.counts, groups.order, groups.tiles, planes),
        *(width, splits, rows, max_rank, y.stride(0), b.table.stride(0)),
        **config,
    )


def shrink_config(dtype: torch.dtype, max_rank: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options of the shrink."""
    return _config(max_rank, block_rows) | {"BLOCK_K": 256 // dtype.itemsize, "num_warps": 4, "num_stages": 3}


def expand_config(dtype: torch.dtype, max_rank: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options of the expand."""
    return _config(max_rank, block_rows) | {"BLOCK_N": 256 // dtype.itemsize, "num_warps": 4, "num_stages": 2}


def _config(max_rank: int, block_rows: int) -> dict[str, Any]:
    # Rows stay at 16 or 32 a tile: at 64 the products become wgmma, whose pipelined form with an operand in registers
    # is miscompiled by ptxas before 13.3.
    return {"BLOCK_M": block_rows, "BLOCK_R": min(64, max(16, triton.next_power_of_2(max_rank)))}


def split_width_of(width: int, tiles: int, block: int) -> int:
    """Columns of x that one program sums: a multiple of `block`, no split empty."""
    splits = min(triton.cdiv(TARGET_PROGRAMS, tiles), triton.cdiv(width, MIN_SPLIT))
    return int(triton.cdiv(triton.cdiv(width, splits), block) * block)


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"a": VALUES, "b": VALUES, "ranks": INTEGERS, "planes": FLOATS, "split_width": MULTIPLE}
    for dtype, rank, rows in (("bf16", 64, 16), ("bf16", 16, 32), ("fp16", 16, 16), ("fp32", 256, 16)):
        shrink = shrink_config(DTYPES[dtype], rank, rows)
        expand = expand_config(DTYPES[dtype], rank, rows)
        yield Variant(f"shrink rank {rank} rows {rows}", shrink_kernel, dtype, shrink, arguments)
        yield Variant(f"expand rank {rank} rows {rows}", expand_kernel, dtype, expand, arguments)
    yield from fused.variants()
