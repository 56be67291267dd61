"""Gated LoRA on a GPU: grouped LoRA's two launches, and one between them that weighs the ranks by row."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.grouped_lora.triton import expand_config, expand_kernel, shrink_config, shrink_kernel, split_width_of
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import FLOATS, INTEGERS, Variant


@triton.jit
def weigh_kernel(
    planes,
    weighed,
    gates,
    counts,
    down_ranks,
    up_ranks,
    order,
    tiles,
    num_splits,
    num_adapted,
    max_down,
    max_up,
    gates_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """weighed[i, r] = the sum of planes[:, i, r % A's rows] times the gate of rank r, for the rows i of one tile."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    rank = tl.load(up_ranks + slot)
    if rank == 0:
        return
    down = tl.load(down_ranks + slot)
    each = rank // (tl.load(counts + slot) - 1)
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    for r_from in range(0, rank, BLOCK_R):
        r = r_from + tl.arange(0, BLOCK_R)
        mask = live[:, None] & (r < rank)[None, :]
        h = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for split in range(0, num_splits):
            h_row = (split * num_adapted + start + m).to(tl.int64) * max_down
            h += tl.load(planes + h_row[:, None] + (r % down)[None, :], mask=mask, other=0.0)
        gate = tl.load(gates + row[:, None] * gates_stride + (r // each)[None, :], mask=mask, other=0.0)
        tl.store(weighed + (start + m).to(tl.int64)[:, None] * max_up + r[None, :], h * gate, mask=mask)


def gated_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, gate: SlotRows, gates: Tensor, groups: RowGroups
) -> None:
    """See `weft.kernels.gated_lora.gated_lora`."""
    most, max_rank = a.max_count, b.max_count
    if not groups.active or max_rank == 0:
        return
    shrink = shrink_config(x.dtype, most, groups.block_rows)
    expand = expand_config(x.dtype, max_rank, groups.block_rows)
    (width_in, width_out), rows = (x.shape[1], y.shape[1]), groups.num_adapted
    split_width = split_width_of(width_in, groups.num_tiles, shrink["BLOCK_K"])
    splits = triton.cdiv(width_in, split_width)
    planes = torch.empty(splits, rows, most, dtype=torch.float32, device=x.device)
    weighed = torch.empty(rows, max_rank, dtype=torch.float32, device=x.device)
    shrink_kernel[(groups.num_tiles, splits)](
        *(x, a.pool, a.table, a.counts, groups.order, groups.tiles, planes),
        *(width_in, split_width, rows, most, x.stride(0), a.table.stride(0)),
        **shrink,
    )
    weigh_kernel[(groups.num_tiles,)](
        *(planes, weighed, gates, gate.counts, a.counts, b.counts, groups.order, groups.tiles),
        *(splits, rows, most, max_rank, gates.stride(0)),
        **weigh_config(groups.block_rows),
    )
    expand_kernel[(groups.num_tiles, triton.cdiv(width_out, expand["BLOCK_N"]))](
        *(y, b.pool, b.table, b.counts, groups.order, groups.tiles, weighed),
        *(width_out, 1, rows, max_rank, y.stride(0), b.table.stride(0)),
        **expand,
    )


def weigh_config(block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    return {"BLOCK_M": block_rows, "BLOCK_R": 32, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    ranks = dict.fromkeys(("down_ranks", "up_ranks"), INTEGERS)
    arguments = ranks | dict.fromkeys(("planes", "weighed", "gates"), FLOATS)
    for dtype, rows in (("bf16", 32), ("fp16", 16), ("fp32", 16)):
        yield Variant(f"weigh rows {rows}", weigh_kernel, dtype, weigh_config(rows), arguments)
