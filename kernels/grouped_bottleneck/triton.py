"""Grouped bottleneck on a GPU: two launches, down into fp32 planes and up into f, split as grouped LoRA is.

Two launches, because every program of the second adds to columns of f that others of the first still read.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.grouped_lora.triton import expand_config, shrink_config, split_width_of
from weft.kernels.groups import RowGroups
from weft.kernels.variants import DTYPES, FLOATS, INTEGERS, MULTIPLE, VALUES, Variant

from . import Bottlenecks


@triton.jit
def down_kernel(
    f,
    r,
    down,
    table,
    counts,
    inputs,
    order,
    tiles,
    planes,
    width,
    split_width,
    num_adapted,
    max_count,
    f_stride,
    r_stride,
    table_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """planes[split, i, :count] = D[slot] x over one split of the columns, for the rows i of one tile."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    count = tl.load(counts + slot)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    given = tl.load(inputs + slot)
    with_f = live & ((given & 1) != 0)
    with_r = live & ((given & 2) != 0)
    k_from = split * split_width
    k_to = tl.minimum(k_from + split_width, width)
    out_row = (split * num_adapted + start + m).to(tl.int64) * max_count
    for u_from in range(0, count, BLOCK_R):
        u = u_from + tl.arange(0, BLOCK_R)
        used = u < count
        d_row = tl.load(table + slot * table_stride + u, mask=used, other=0).to(tl.int64) * width
        acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for k_at in range(k_from, k_to, BLOCK_K):
            k = k_at + tl.arange(0, BLOCK_K)
            inside = k < k_to
            f_block = tl.load(f + row[:, None] * f_stride + k[None, :], mask=with_f[:, None] & inside[None, :], other=0)
            r_block = tl.load(r + row[:, None] * r_stride + k[None, :], mask=with_r[:, None] & inside[None, :], other=0)
            x_block = (f_block.to(tl.float32) + r_block.to(tl.float32)).to(f_block.dtype)
            d_block = tl.load(down + d_row[None, :] + k[:, None], mask=used[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(x_block, d_block, acc, input_precision="ieee")
        tl.store(planes + out_row[:, None] + u[None, :], acc, mask=live[:, None] & used[None, :])


@triton.jit
def logistic(z):
    """Of fp32. The exponential does not overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(z):
    """Of fp32, by the logistic function."""
    return 2.0 * logistic(2.0 * z) - 1.0


@triton.jit
def activate(z, activation):
    """An `Activation` of fp32."""
    if activation == 1:
        z = tl.where(z < 0.0, 0.0, z)
    elif activation == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif activation == 3:
        z = 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif activation == 4:
        z = z * logistic(z)
    elif activation == 5:
        z = tanh(z)
    elif activation == 6:
        z = logistic(z)
    elif activation == 7:
        z = tl.where(z < 0.0, 0.01 * z, z)
    return z


@triton.jit
def up_kernel(
    f,
    up,
    table,
    counts,
    bias,
    bias_table,
    up_bias,
    up_bias_table,
    activations,
    gates,
    order,
    tiles,
    planes,
    width,
    num_splits,
    num_adapted,
    max_count,
    f_stride,
    table_stride,
    bias_table_stride,
    up_bias_table_stride,
    gates_stride,
    HAS_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """f[order[i], n] += act(sum of the planes + b) . U[slot][:, n] + c[n], for a tile of rows and of columns."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    start = tl.load(tiles + 3 * tl.program_id(0) + 1)
    length = tl.load(tiles + 3 * tl.program_id(0) + 2)
    count = tl.load(counts + slot)
    if count == 0:
        return
    activation = tl.load(activations + slot)
    m = tl.arange(0, BLOCK_M)
    live = m < length
    row = tl.load(order + start + m, mask=live, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    c_row = tl.load(up_bias_table + slot * up_bias_table_stride).to(tl.int64) * width
    c = tl.load(up_bias + c_row + n, mask=inside, other=0.0).to(tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32) + c[None, :]
    for u_from in range(0, count, BLOCK_R):
        u = u_from + tl.arange(0, BLOCK_R)
        used = u < count
        b_row = tl.load(bias_table + slot * bias_table_stride + u // width, mask=used, other=0).to(tl.int64) * width
        b = tl.load(bias + b_row + u % width, mask=used, other=0.0).to(tl.float32)
        z = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32) + b[None, :]
        for split in range(0, num_splits):
            z_row = (split * num_adapted + start + m).to(tl.int64) * max_count
            z += tl.load(planes + z_row[:, None] + u[None, :], mask=live[:, None] & used[None, :], other=0.0)
        u_row = tl.load(table + slot * table_stride + u, mask=used, other=0).to(tl.int64) * width
        u_block = tl.load(up + u_row[:, None] + n[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(activate(z, activation).to(u_block.dtype), u_block, acc, input_precision="ieee")
    if HAS_GATES:
        acc = acc * tl.load(gates + row * gates_stride, mask=live, other=0.0)[:, None]
    at = f + row[:, None] * f_stride + n[None, :]
    touched = live[:, None] & inside[None, :]
    tl.store(at, (tl.load(at, mask=touched, other=0.0).to(tl.float32) + acc).to(f.dtype.element_ty), mask=touched)


def grouped_bottleneck(
    f: Tensor, r: Tensor, bottlenecks: Bottlenecks, groups: RowGroups, gates: Tensor | None = None
) -> None:
    """See `weft.kernels.grouped_bottleneck.grouped_bottleneck`."""
    down, up, bias, up_bias = bottlenecks.down, bottlenecks.up, bottlenecks.down_bias, bottlenecks.up_bias
    most, width, rows = down.max_count, f.shape[1], groups.num_adapted
    if not groups.active or most == 0:
        return
    shrink = down_config(f.dtype, most, groups.block_rows)
    expand = up_config(f.dtype, most, groups.block_rows)
    split_width = split_width_of(width, groups.num_tiles, shrink["BLOCK_K"])
    splits = triton.cdiv(width, split_width)
    planes = torch.empty(splits, rows, most, dtype=torch.float32, device=f.device)
    shared = (groups.order, groups.tiles, planes, width)
    down_strides = (f.stride(0), r.stride(0), down.table.stride(0))
    down_kernel[(groups.num_tiles, splits)](
        f,
        r,
        down.pool,
        down.table,
        down.counts,
        bottlenecks.inputs,
        *shared,
        split_width,
        rows,
        most,
        *down_strides,
        **shrink,
    )
    up_strides = (f.stride(0), up.table.stride(0), bias.table.stride(0), up_bias.table.stride(0))
    up_kernel[(groups.num_tiles, triton.cdiv(width, expand["BLOCK_N"]))](
        f,
        up.pool,
        up.table,
        up.counts,
        bias.pool,
        bias.table,
        up_bias.pool,
        up_bias.table,
        bottlenecks.activations,
        f if gates is None else gates,
        *shared,
        splits,
        rows,
        most,
        *up_strides,
        0 if gates is None else gates.stride(0),
        HAS_GATES=gates is not None,
        **expand,
    )


def down_config(dtype: torch.dtype, max_count: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options of the way down."""
    return shrink_config(dtype, max_count, block_rows) | {"num_stages": 2}  # f and r: with three, fp32 spills


def up_config(dtype: torch.dtype, max_count: int, block_rows: int) -> dict[str, Any]:
    """Block sizes and launch options of the way up."""
    return expand_config(dtype, max_count, block_rows)


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {
        **dict.fromkeys(("f", "r", "down", "up", "bias", "up_bias"), VALUES),
        **dict.fromkeys(("inputs", "activations", "bias_table", "up_bias_table"), INTEGERS),
        **dict.fromkeys(("planes", "gates"), FLOATS),
        **dict.fromkeys(("split_width", "f_stride", "r_stride"), MULTIPLE),
    }
    for dtype, units, rows in (("bf16", 64, 16), ("bf16", 256, 32), ("fp16", 16, 16), ("fp32", 256, 16)):
        down = down_config(DTYPES[dtype], units, rows)
        up = up_config(DTYPES[dtype], units, rows)
        yield Variant(f"bottleneck down {units} rows {rows}", down_kernel, dtype, down, arguments)
        for gated in (False, True):
            name = f"bottleneck up {units} rows {rows}{' gated' if gated else ''}"
            yield Variant(name, up_kernel, dtype, up | {"HAS_GATES": gated}, arguments)
