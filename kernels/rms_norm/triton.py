"""RMS norm on a GPU: one launch, a program for as many rows as fill a block."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.variants import DTYPES, FLOAT, VALUES, Variant


@triton.jit
def rms_norm_kernel(
    y,
    x,
    weight,
    rows,
    width,
    eps,
    offset,
    ROUND_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[m] = x[m] / sqrt(mean(x[m]^2) + eps) * (offset + weight) for the rows m of one block."""
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    squares = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, width, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        value = tl.load(x + m * width + n, mask=(m < rows) & (n < width), other=0.0).to(tl.float32)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)
    for start in range(0, width, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        inside = (m < rows) & (n < width)
        value = tl.load(x + m * width + n, mask=inside, other=0.0).to(tl.float32) * scale
        if ROUND_FIRST:
            value = value.to(y.dtype.element_ty).to(tl.float32)
        value = value * (offset + tl.load(weight + n, mask=n < width, other=0.0).to(tl.float32))
        tl.store(y + m * width + n, value.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, round_first: bool) -> Tensor:
    """See `weft.kernels.rms_norm.rms_norm`; x is contiguous and not empty."""
    y, width = torch.empty_like(x), x.shape[-1]
    rows, config = x.numel() // width, norm_config(width)
    rms_norm_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
        y, x, weight, rows, width, float(eps), float(offset), ROUND_FIRST=round_first, **config
    )
    return y


def norm_config(width: int) -> dict[str, Any]:
    """Block sizes and launch options: long rows are walked through, and read again from the cache."""
    columns = min(4096, triton.next_power_of_2(width))
    return {"BLOCK_M": max(1, 512 // columns), "BLOCK_N": columns, "num_warps": max(2, columns // 512)}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"weight": VALUES, "eps": FLOAT, "offset": FLOAT}
    for dtype in DTYPES:
        for width in (128, 768, 8192):
            config = norm_config(width) | {"ROUND_FIRST": True}
            yield Variant(f"rms norm {width}", rms_norm_kernel, dtype, config, arguments)
