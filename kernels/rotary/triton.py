"""Rotary position embedding on a GPU: one launch, a program for each token and block of heads, queries' and keys'."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.variants import DTYPES, MULTIPLE, VALUES, Variant

from .reference import heads_of_tokens


@triton.jit
def rotate(y, x, head, heads, half, stride_head, stride_token, token, i, c_low, c_high, s_low, s_high):
    """Both halves of some heads of one tensor at one token."""
    inside = (head < heads) & (i < half)
    low = x + head * stride_head + token * stride_token + i
    a = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(low + half, mask=inside, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    first = (a * c_low).to(dtype).to(tl.float32) + (-b * s_low).to(dtype).to(tl.float32)
    second = (b * c_high).to(dtype).to(tl.float32) + (a * s_high).to(dtype).to(tl.float32)
    to = y + (token * heads + head) * 2 * half + i
    tl.store(to, first.to(dtype), mask=inside)
    tl.store(to + half, second.to(dtype), mask=inside)


@triton.jit
def rotary_kernel(
    q_out,
    k_out,
    q,
    k,
    cos,
    sin,
    heads,
    kv_heads,
    half,
    q_stride_head,
    q_stride_token,
    k_stride_head,
    k_stride_token,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The heads of one block at one token: the first blocks are the queries', the rest the keys'."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_D)[None, :]
    angle = token * 2 * half + i
    c_low = tl.load(cos + angle, mask=i < half, other=0.0).to(tl.float32)
    c_high = tl.load(cos + angle + half, mask=i < half, other=0.0).to(tl.float32)
    s_low = tl.load(sin + angle, mask=i < half, other=0.0).to(tl.float32)
    s_high = tl.load(sin + angle + half, mask=i < half, other=0.0).to(tl.float32)
    blocks = tl.cdiv(heads, BLOCK_H)
    head = tl.arange(0, BLOCK_H)[:, None]
    if block < blocks:
        head += block * BLOCK_H
        rotate(q_out, q, head, heads, half, q_stride_head, q_stride_token, token, i, c_low, c_high, s_low, s_high)
    else:
        head += (block - blocks) * BLOCK_H
        rotate(k_out, k, head, kv_heads, half, k_stride_head, k_stride_token, token, i, c_low, c_high, s_low, s_high)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.rotary.rotary`."""
    q_out, k_out = heads_of_tokens(q), heads_of_tokens(k)
    (_, heads, tokens, width), kv_heads = q.shape, k.shape[1]
    config = rotary_config(width)
    grid = (tokens, triton.cdiv(heads, config["BLOCK_H"]) + triton.cdiv(kv_heads, config["BLOCK_H"]))
    strides = q.stride(1), q.stride(2), k.stride(1), k.stride(2)
    rotary_kernel[grid](q_out, k_out, q, k, cos, sin, heads, kv_heads, width // 2, *strides, **config)
    return q_out, k_out


def rotary_config(width: int) -> dict[str, Any]:
    """Block sizes and launch options: about a thousand elements for each program."""
    columns = triton.next_power_of_2(width // 2)
    return {"BLOCK_H": max(1, 512 // columns), "BLOCK_D": columns, "num_warps": 2}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = dict.fromkeys(("q_out", "k_out", "q", "k", "cos", "sin"), VALUES)
    arguments |= dict.fromkeys(("half", "q_stride_head", "q_stride_token", "k_stride_head", "k_stride_token"), MULTIPLE)
    for dtype in DTYPES:
        for width in (64, 128, 256):
            yield Variant(f"rotary {width}", rotary_kernel, dtype, rotary_config(width), arguments)
