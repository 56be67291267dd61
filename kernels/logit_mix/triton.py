"""Logit mix on a GPU: one launch, a program for each output row and block of tokens."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.logit_mix import MixTerms
from weft.kernels.variants import FLOATS, INTEGERS, MULTIPLE, VALUES, Variant


@triton.jit
def mix_kernel(
    out,
    source,
    starts,
    rows,
    weights,
    widths,
    out_stride,
    source_stride,
    BLOCK_N: tl.constexpr,
):
    """out[row] += the terms of one row over one block of tokens."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    stop = tl.load(starts + row + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < tl.load(widths + row)) & (start < stop)
    at = out + row * out_stride + n
    mixed = tl.load(at, mask=inside, other=0.0)
    for j in range(start, stop):
        term = source + tl.load(rows + j).to(tl.int64) * source_stride + n
        mixed += tl.load(weights + j) * tl.load(term, mask=inside, other=0.0)
    tl.store(at, mixed, mask=inside)


def logit_mix(out: Tensor, source: Tensor, terms: MixTerms) -> None:
    """See `weft.kernels.logit_mix.logit_mix`."""
    widest = max(terms.host_widths, default=0)
    if not widest:
        return
    config = mix_config()
    mix_kernel[(out.shape[0], triton.cdiv(widest, config["BLOCK_N"]))](
        out,
        source,
        terms.starts,
        terms.rows,
        terms.weights,
        terms.widths,
        out.stride(0),
        source.stride(0),
        **config,
    )


def mix_config() -> dict[str, Any]:
    """Block size and launch options."""
    return {"BLOCK_N": 2048, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {
        **dict.fromkeys(("out", "source"), VALUES),
        **dict.fromkeys(("starts", "rows", "widths"), INTEGERS),
        **dict.fromkeys(("out_stride", "source_stride"), MULTIPLE),
        "weights": FLOATS,
    }
    yield Variant("logit mix", mix_kernel, "fp32", mix_config(), arguments)
