"""Weighted sum on a GPU: one launch, a program for each row that is written and block of columns."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.variants import DTYPES, FLOATS, INTEGERS, MULTIPLE, VALUES, Variant


@triton.jit
def weighted_sum_kernel(
    out,
    where,
    source,
    index,
    weights,
    terms,
    width,
    out_stride,
    source_stride,
    BLOCK_N: tl.constexpr,
):
    """out[where[i]] = sum_j weights[i, j] * source[index[i, j]] over one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for term in range(terms):
        at = tl.load(index + row * terms + term).to(tl.int64)
        weight = tl.load(weights + row * terms + term)
        # What is not there must not be read: a row that nobody has written may hold anything.
        value = tl.load(source + at * source_stride + n, mask=inside & (at >= 0), other=0.0)
        total += weight * value.to(tl.float32)
    to = tl.load(where + row).to(tl.int64)
    tl.store(out + to * out_stride + n, total.to(out.dtype.element_ty), mask=inside)


def weighted_sum(out: Tensor, where: Tensor, source: Tensor, index: Tensor, weights: Tensor) -> None:
    """See `weft.kernels.weighted_sum.weighted_sum`."""
    config = weighted_sum_config(out.dtype)
    weighted_sum_kernel[(len(where), triton.cdiv(out.shape[1], config["BLOCK_N"]))](
        out,
        where,
        source,
        index,
        weights,
        index.shape[1],
        out.shape[1],
        out.stride(0),
        source.stride(0),
        **config,
    )


def weighted_sum_config(dtype: torch.dtype) -> dict[str, Any]:
    """Block size and launch options."""
    return {"BLOCK_N": 4096 // dtype.itemsize, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {
        **dict.fromkeys(("out", "source"), VALUES),
        **dict.fromkeys(("where", "index"), INTEGERS),
        **dict.fromkeys(("out_stride", "source_stride"), MULTIPLE),
        "weights": FLOATS,
    }
    for dtype in DTYPES:
        yield Variant("weighted sum", weighted_sum_kernel, dtype, weighted_sum_config(DTYPES[dtype]), arguments)
