"""Mean gates on a GPU: a launch that scores tiles of rows, and one with a program for each span that takes its mean.

Two launches, because a span may have many tiles; no atomics, so that the same rows give the same means on every run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.spans import Spans
from weft.kernels.variants import DTYPES, FLOATS, INTEGERS, VALUES, Variant


@triton.jit
def score_kernel(
    x,
    pool,
    table,
    counts,
    links,
    order,
    tiles,
    scored,
    width,
    most,
    x_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scored[order[i], :n] = link(W[slot] x[order[i]] + b[slot]) for the rows i of one tile."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    count = tl.load(counts + slot) - 1
    if count < 1:
        return
    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    live = m < length
    there = e < count
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    g_row = tl.load(table + slot * table_stride + e, mask=there, other=0).to(tl.int64) * width
    scores = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    for k_at in range(0, width, BLOCK_K):
        k = k_at + tl.arange(0, BLOCK_K)
        inside = k < width
        x_block = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        g_block = tl.load(pool + g_row[None, :] + k[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(x_block, g_block, scores, input_precision="ieee")
    b_row = tl.load(table + slot * table_stride + count).to(tl.int64) * width
    scores += tl.load(pool + b_row + e, mask=there, other=0.0).to(tl.float32)[None, :]
    if tl.load(links + slot) == 2:
        scores = tl.where(there[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = weights / tl.sum(weights, 1)[:, None]
    else:
        small = tl.exp(-tl.abs(scores))  # does not overflow
        result = tl.where(scores < 0.0, small, 1.0) / (1.0 + small)
    tl.store(scored + row[:, None] * most + e[None, :], result, mask=live[:, None] & there[None, :])


@triton.jit
def mean_kernel(
    scored,
    result,
    slots,
    counts,
    bounds,
    most,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """result[t, :n] = the mean of scored[:, :n] over one span, for each of its tokens t."""
    start = tl.load(bounds + tl.program_id(0))
    stop = tl.load(bounds + tl.program_id(0) + 1)
    slot = tl.load(slots + start)
    if slot < 0:
        return
    count = tl.load(counts + slot) - 1
    if count < 1:
        return
    e = tl.arange(0, BLOCK_E)
    there = e < count
    total = tl.full((BLOCK_E,), 0.0, tl.float32)
    for at in range(start, stop, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        mask = (token < stop)[:, None] & there[None, :]
        total += tl.sum(tl.load(scored + token.to(tl.int64)[:, None] * most + e[None, :], mask=mask, other=0.0), 0)
    mean = total / (stop - start).to(tl.float32)
    for at in range(start, stop, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        mask = (token < stop)[:, None] & there[None, :]
        spread = tl.full((BLOCK_T, BLOCK_E), 0.0, tl.float32) + mean[None, :]
        tl.store(result + token.to(tl.int64)[:, None] * most + e[None, :], spread, mask=mask)


def mean_gates(x: Tensor, gates: SlotRows, links: Tensor, spans: Spans, groups: RowGroups) -> Tensor:
    """See `weft.kernels.mean_gates.mean_gates`."""
    most = gates.max_count - 1
    result = torch.ones(len(x), most, device=x.device)
    if not groups.active:
        return result
    scored = torch.empty_like(result)
    score_kernel[(groups.num_tiles,)](
        *(x, gates.pool, gates.table, gates.counts, links, groups.order, groups.tiles, scored),
        *(gates.width, most, x.stride(0), gates.table.stride(0)),
        **score_config(x.dtype, most, groups.block_rows),
    )
    mean_kernel[(spans.count,)](scored, result, groups.slots, gates.counts, spans.bounds, most, **mean_config(most))
    return result


def score_config(dtype: torch.dtype, most: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options of the scores."""
    options = {"BLOCK_K": 128 // dtype.itemsize, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": block_rows, "BLOCK_E": max(16, triton.next_power_of_2(most))} | options


def mean_config(most: int) -> dict[str, Any]:
    """Block sizes and launch options of the means."""
    return {"BLOCK_T": 64, "BLOCK_E": triton.next_power_of_2(most), "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"pool": VALUES, "links": INTEGERS, "bounds": INTEGERS, "scored": FLOATS, "result": FLOATS}
    for dtype, gates, rows in (("bf16", 16, 32), ("bf16", 64, 32), ("fp16", 8, 16), ("fp32", 64, 16)):
        config = score_config(DTYPES[dtype], gates, rows)
        yield Variant(f"score gates {gates} rows {rows}", score_kernel, dtype, config, arguments)
        yield Variant(f"mean gates {gates}", mean_kernel, dtype, mean_config(gates), arguments)
