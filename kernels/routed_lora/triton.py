"""Routed LoRA on a GPU: grouped LoRA's two launches, and one between them that weighs each expert's ranks by row."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.grouped_lora.triton import expand_config, expand_kernel, shrink_config, shrink_kernel, split_width_of
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import DTYPES, FLOATS, INTEGERS, VALUES, Variant


@triton.jit
def route_kernel(
    x,
    prototypes,
    table,
    counts,
    ranks,
    top_k,
    order,
    tiles,
    planes,
    width,
    num_splits,
    num_adapted,
    max_rank,
    x_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """planes[split, i, r] *= the weight that row order[i] gives to the expert of rank r, for the rows i of one tile."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    experts = tl.load(counts + slot)
    if (experts == 0) | (length == 0):
        return
    rank = tl.load(ranks + slot)
    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    live = m < length
    there = e < experts
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    p_row = tl.load(table + slot * table_stride + e, mask=there, other=0).to(tl.int64) * width
    likeness = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    for k_at in range(0, width, BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        inside = k < width
        x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        p_block = tl.load(prototypes + p_row[None, :] + k[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        likeness = tl.dot(x_block, p_block, likeness, input_precision="ieee")
    likeness = tl.where(there[None, :], tl.abs(likeness), float("-inf"))

    rest = likeness
    kept = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    for _ in range(0, tl.load(top_k + slot)):
        best = tl.max(rest, 1)
        first = tl.min(tl.where(rest == best[:, None], e[None, :], BLOCK_E), 1)  # one of equals
        chosen = e[None, :] == first[:, None]
        kept = tl.where(chosen, 1.0, kept)
        rest = tl.where(chosen, float("-inf"), rest)
    weights = tl.exp(likeness - tl.max(likeness, 1)[:, None]) * kept
    weights = weights / tl.sum(weights, 1)[:, None]

    each = rank // experts
    for r_from in range(0, rank, BLOCK_R):
        r = r_from + tl.arange(0, BLOCK_R)
        ranked = r < rank
        of = (e[:, None] == (r // each)[None, :]).to(tl.float32)
        spread = tl.dot(weights, of, input_precision="ieee")
        for split in range(0, num_splits):
            h_row = (split * num_adapted + start + m).to(tl.int64) * max_rank
            at = planes + h_row[:, None] + r[None, :]
            touched = live[:, None] & ranked[None, :]
            tl.store(at, tl.load(at, mask=touched, other=0.0) * spread, mask=touched)


def routed_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, prototypes: SlotRows, top_k: Tensor, groups: RowGroups
) -> None:
    """See `weft.kernels.routed_lora.routed_lora`."""
    max_rank = a.max_count
    if not groups.active or max_rank == 0:
        return
    shrink = shrink_config(x.dtype, max_rank, groups.block_rows)
    expand = expand_config(x.dtype, max_rank, groups.block_rows)
    (width_in, width_out), rows = (x.shape[1], y.shape[1]), groups.num_adapted
    split_width = split_width_of(width_in, groups.num_tiles, shrink["BLOCK_K"])
    splits = triton.cdiv(width_in, split_width)
    planes = torch.empty(splits, rows, max_rank, dtype=torch.float32, device=x.device)
    grouped = (groups.order, groups.tiles, planes)
    shrink_kernel[(groups.num_tiles, splits)](
        *(x, a.pool, a.table, a.counts, *grouped),
        *(width_in, split_width, rows, max_rank, x.stride(0), a.table.stride(0)),
        **shrink,
    )
    route_kernel[(groups.num_tiles,)](
        *(x, prototypes.pool, prototypes.table, prototypes.counts, a.counts, top_k, *grouped),
        *(width_in, splits, rows, max_rank, x.stride(0), prototypes.table.stride(0)),
        **route_config(x.dtype, prototypes.max_count, groups.block_rows),
    )
    expand_kernel[(groups.num_tiles, triton.cdiv(width_out, expand["BLOCK_N"]))](
        *(y, b.pool, b.table, a.counts, *grouped),
        *(width_out, splits, rows, max_rank, y.stride(0), b.table.stride(0)),
        **expand,
    )


def route_config(dtype: torch.dtype, max_experts: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    block = max(16, triton.next_power_of_2(max_experts))
    options = {"BLOCK_K": 128 // dtype.itemsize, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": block_rows, "BLOCK_E": block} | options


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"prototypes": VALUES, "ranks": INTEGERS, "top_k": INTEGERS, "planes": FLOATS}
    for dtype, experts, rows in (("bf16", 16, 32), ("bf16", 64, 32), ("fp16", 8, 16), ("fp32", 64, 16)):
        config = route_config(DTYPES[dtype], experts, rows)
        yield Variant(f"route experts {experts} rows {rows}", route_kernel, dtype, config, arguments)
