"""Grouped turn on a GPU: one launch, a program for each row that has an adapter and block of pairs.

A program reads and writes both elements of its pairs, so that no other one sees half of a pair turned.
"""

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
def turn_kernel(
    y,
    turn,
    table,
    counts,
    distances,
    order,
    slots,
    width,
    y_stride,
    table_stride,
    BLOCK_N: tl.constexpr,
):
    """y[row] + own * y[row] + other * partner of y[row] over one block of pairs."""
    row = tl.load(order + tl.program_id(0)).to(tl.int64)
    if row < 0:  # the order of a captured step is filled up
        return
    slot = tl.load(slots + row)
    if tl.load(counts + slot) == 0:
        return
    distance = tl.load(distances + slot)
    pair = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pair < width // 2
    n = pair // distance * 2 * distance + pair % distance
    p = n + distance
    own = turn + tl.load(table + slot * table_stride).to(tl.int64) * width
    other = turn + tl.load(table + slot * table_stride + 1).to(tl.int64) * width
    at = y + row * y_stride
    first = tl.load(at + n, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + p, mask=inside, other=0.0).to(tl.float32)
    n_own = tl.load(own + n, mask=inside, other=0.0).to(tl.float32)
    n_other = tl.load(other + n, mask=inside, other=0.0).to(tl.float32)
    p_own = tl.load(own + p, mask=inside, other=0.0).to(tl.float32)
    p_other = tl.load(other + p, mask=inside, other=0.0).to(tl.float32)
    tl.store(at + n, (first + n_own * first + n_other * second).to(y.dtype.element_ty), mask=inside)
    tl.store(at + p, (second + p_own * second + p_other * first).to(y.dtype.element_ty), mask=inside)


def grouped_turn(y: Tensor, turn: SlotRows, distances: Tensor, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_turn.grouped_turn`."""
    if not groups.active or turn.max_count == 0:
        return
    config = turn_config(y.dtype)
    turn_kernel[(groups.num_adapted, triton.cdiv(y.shape[1] // 2, config["BLOCK_N"]))](
        y,
        turn.pool,
        turn.table,
        turn.counts,
        distances,
        groups.order,
        groups.slots,
        y.shape[1],
        y.stride(0),
        turn.table.stride(0),
        **config,
    )


def turn_config(dtype: torch.dtype) -> dict[str, Any]:
    """Block size and launch options."""
    return {"BLOCK_N": 2048 // dtype.itemsize, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"turn": VALUES, "distances": INTEGERS}
    for dtype in DTYPES:
        yield Variant("turn", turn_kernel, dtype, turn_config(DTYPES[dtype]), arguments)
