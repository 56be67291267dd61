"""Gated prefix on a GPU: one launch, a program for each tile of rows and query head, online softmax over the keys."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.variants import FLOAT, FLOATS, INTEGERS, MULTIPLE, VALUES, Variant

from . import Joint


@triton.jit
def prefix_kernel(
    y,
    q,
    keys,
    values,
    key_table,
    value_table,
    counts,
    lse,
    gates,
    order,
    tiles,
    width,
    scale,
    y_stride,
    q_token_stride,
    q_head_stride,
    key_table_stride,
    value_table_stride,
    JOINT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[order[i], head] += softmax(q[order[i], head] . K[slot]) V[slot] for the rows i of one tile and one head.

    Joint, the running sums start from what attention found: it is one more key, of score L and value y.
    """
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    count = tl.load(counts + slot)
    if count == 0:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    live = m < length
    inside = d < HEAD_DIM
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    touched = live[:, None] & inside[None, :]
    q_block = tl.load(q + row[:, None] * q_token_stride + head * q_head_stride + d[None, :], mask=touched, other=0.0)
    column = head // GROUP * HEAD_DIM + d

    at = y + row[:, None] * y_stride + head * HEAD_DIM + d[None, :]
    own = tl.load(at, mask=touched, other=0.0).to(tl.float32)
    if JOINT:
        top = tl.load(lse + row * tl.num_programs(1) + head, mask=live, other=0.0) * 1.4426950408889634
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
        acc = own
        key_gate = tl.load(gates + row * 2, mask=live, other=0.0) * scale
        value_gate = tl.load(gates + row * 2 + 1, mask=live, other=0.0)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.full((BLOCK_M,), 0.0, tl.float32)
        acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for n_from in range(0, count, BLOCK_N):  # every block has a key, so no score of all rows is -inf
        n = n_from + tl.arange(0, BLOCK_N)
        there = n < count
        k_row = tl.load(key_table + slot * key_table_stride + n, mask=there, other=0).to(tl.int64) * width
        v_row = tl.load(value_table + slot * value_table_stride + n, mask=there, other=0).to(tl.int64) * width
        k_block = tl.load(keys + k_row[None, :] + column[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        v_block = tl.load(values + v_row[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(q_block, k_block, input_precision="ieee") * 1.4426950408889634
        if JOINT:
            scores = scores * key_gate[:, None]
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if JOINT:
            weights = weights * value_gate[:, None]
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    found = acc / total[:, None]
    if not JOINT:
        found += own
    tl.store(at, found.to(y.dtype.element_ty), mask=touched)


def gated_prefix(
    y: Tensor, q: Tensor, keys: SlotRows, values: SlotRows, groups: RowGroups, joint: Joint | None = None
) -> None:
    """See `weft.kernels.gated_prefix.gated_prefix`."""
    if not groups.active or values.max_count == 0:
        return
    heads, width = q.shape[1:]
    group = heads // (keys.width // width)
    prefix_kernel[(groups.num_tiles, heads)](
        y,
        q,
        keys.pool,
        values.pool,
        keys.table,
        values.table,
        values.counts,
        y if joint is None else joint.lse,
        y if joint is None else joint.gates,
        groups.order,
        groups.tiles,
        keys.width,
        1.0 if joint is None else joint.scale,
        y.stride(0),
        q.stride(0),
        q.stride(1),
        keys.table.stride(0),
        values.table.stride(0),
        JOINT=joint is not None,
        **prefix_config(group, width, groups.block_rows),
    )


def prefix_config(group: int, width: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options."""
    block = max(16, triton.next_power_of_2(width))
    return {
        "GROUP": group,
        "HEAD_DIM": width,
        "BLOCK_M": block_rows,
        "BLOCK_N": 32 if block <= 128 else 16,
        "BLOCK_D": block,
        "num_warps": 4,
        "num_stages": 2,
    }


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {
        **dict.fromkeys(("q", "keys", "values"), VALUES),
        **dict.fromkeys(("key_table", "value_table"), INTEGERS),
        **dict.fromkeys(("lse", "gates"), FLOATS),
        **dict.fromkeys(("q_token_stride", "q_head_stride"), MULTIPLE),
        "scale": FLOAT,
    }
    shapes = (("bf16", 4, 128, 32), ("fp16", 1, 80, 16), ("bf16", 8, 256, 16), ("fp32", 4, 256, 16))
    for dtype, group, width, rows in shapes:
        config = prefix_config(group, width, rows)
        for joint in (False, True):
            name = f"prefix d {width} rows {rows}{' joint' if joint else ''}"
            yield Variant(name, prefix_kernel, dtype, config | {"JOINT": joint}, arguments)
