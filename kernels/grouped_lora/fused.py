"""Grouped LoRA on a GPU in one launch, for the smallest batches: what a launch costs is more than what it reads.

A program serves one tile of `RowGroups.tiles` and a wide part of y's columns. It makes h = A x of its tile itself, so A
and x are read once for each part, from the L2 cache but for the first time; B and y are read once, as by two launches.
No sum is split, and nothing is added by atomics: the same result on every run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import DTYPES, INTEGERS, MULTIPLE, VALUES, Variant

MAX_RANK = 64
"""h of a tile stays in registers."""
PROGRAMS = 128
"""About as many as devices have multiprocessors (108 to 304): all run at once, and read A at the same time."""
FEW_RANKS = 64
A_BYTES = 128 << 10
"""One launch is chosen up to so many ranks of all tiles together, and so many bytes of a slot's A, which every program
reads alone. Neither is measured: half of where launches are reckoned to cost more than the factors' bytes, and rank 16
at a width of 4096 in 16 bits. `benchmarks/gpu_suite.py --sections bandwidth` times both ways."""


@triton.jit
def fused_kernel(
    y,
    x,
    a,
    b,
    a_table,
    b_table,
    ranks,
    order,
    tiles,
    width_in,
    width_out,
    part_width,
    x_stride,
    y_stride,
    a_stride,
    b_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[order[i], n] += (A[slot] x[order[i]]) . B[slot][:, n], for a tile of rows i and a part of the columns n."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    rank = tl.load(ranks + slot, mask=length > 0, other=0)
    if rank == 0:  # y + 0 would turn -0.0 into 0.0
        return
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    ranked = r < rank
    a_row = tl.load(a_table + slot * a_stride + r, mask=ranked, other=0).to(tl.int64) * width_in
    h = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    for k_at in range(0, width_in, BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        inside = k < width_in
        x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        a_block = tl.load(a + a_row[None, :] + k[:, None], mask=ranked[None, :] & inside[:, None], other=0.0)
        h = tl.dot(x_block, a_block, h, input_precision="ieee")
    rounded = h.to(b.dtype.element_ty)
    b_row = tl.load(b_table + slot * b_stride + r, mask=ranked, other=0).to(tl.int64) * width_out
    n_from = tl.program_id(1) * part_width
    for n_at in range(n_from, tl.minimum(n_from + part_width, width_out), BLOCK_N):
        n = n_at + tl.arange(0, BLOCK_N)
        inside = n < width_out
        b_block = tl.load(b + b_row[:, None] + n[None, :], mask=ranked[:, None] & inside[None, :], other=0.0)
        added = tl.dot(rounded, b_block, input_precision="ieee")
        at = y + row[:, None] * y_stride + n[None, :]
        touched = live[:, None] & inside[None, :]
        tl.store(at, (tl.load(at, mask=touched, other=0.0).to(tl.float32) + added).to(y.dtype.element_ty), mask=touched)


def grouped_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`.

    Raises:
        ValueError: a rank above ``MAX_RANK``.
    """
    if not groups.active or a.max_count == 0:
        return
    if a.max_count > MAX_RANK:
        raise ValueError(f"rank {a.max_count} is more than {MAX_RANK}, which one launch serves")
    config = fused_config(x.dtype, a.padded_count, groups.block_rows)
    width_in, width_out = x.shape[1], y.shape[1]
    part_width = part_width_of(width_out, groups.num_tiles, config["BLOCK_N"])
    fused_kernel[(groups.num_tiles, triton.cdiv(width_out, part_width))](
        *(y, x, a.pool, b.pool, a.table, b.table, a.counts, groups.order, groups.tiles),
        *(width_in, width_out, part_width, x.stride(0), y.stride(0), a.table.stride(0), b.table.stride(0)),
        **config,
    )


def one_launch_pays(tiles: int, max_rank: int, width_in: int, itemsize: int) -> bool:
    """Whether `tiles` of ranks up to `max_rank` at a site of `width_in` inputs are served by one launch."""
    return max_rank <= MAX_RANK and tiles * max_rank <= FEW_RANKS and max_rank * width_in * itemsize <= A_BYTES


def part_width_of(width: int, tiles: int, block: int) -> int:
    """Columns of y that one program serves: a multiple of `block`, no part empty."""
    parts = max(1, min(PROGRAMS // tiles, triton.cdiv(width, block)))
    return int(triton.cdiv(triton.cdiv(width, parts), block) * block)


def fused_config(dtype: torch.dtype, max_rank: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    block_r = max(16, triton.next_power_of_2(max_rank))
    # A program alone reads A: what is under way at once hides the memory's latency.
    sizes = {"BLOCK_K": (512 if block_r == 16 else 256) // dtype.itemsize, "BLOCK_N": 256 // dtype.itemsize}
    warps = 8 if dtype.itemsize * block_rows * block_r > 4096 else 4  # with four, fp32 spills
    return {"BLOCK_M": block_rows, "BLOCK_R": block_r, **sizes, "num_warps": warps, "num_stages": 3}


def variants() -> Iterator[Variant]:
    """Of this file, for those of the folder."""
    tables = dict.fromkeys(("a_table", "b_table", "ranks"), INTEGERS)
    arguments = {"a": VALUES, "b": VALUES, **tables, **dict.fromkeys(("width_in", "width_out", "part_width"), MULTIPLE)}
    for dtype, rank, rows in (("bf16", 16, 16), ("bf16", 64, 32), ("fp16", 32, 16), ("fp32", 64, 32)):
        config = fused_config(DTYPES[dtype], rank, rows)
        yield Variant(f"fused rank {rank} rows {rows}", fused_kernel, dtype, config, arguments)
