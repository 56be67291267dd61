"""Paged attention on a GPU: one kernel for rows of any query length, online softmax over blocks of keys.

The query heads that share a key head are folded into the query's length: a program serves BLOCK_M consecutive (token,
head) pairs of one row and one key head, so a decode row fills a tile as well as its group allows.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import to_device
from weft.kernels.variants import DTYPES, FLOAT, FLOATS, INTEGERS, MULTIPLE, VALUES, Variant

from .rows import AttentionRows, LogSumExp

LOG2_E = math.log2(math.e)


@triton.jit
def attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    sinks,
    tiles,
    query_starts,
    context_lens,
    page_table,
    kv_heads,
    score_scale,
    softcap_scale,
    window,
    q_token_stride,
    q_head_stride,
    page_table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Scores are kept in base 2: score_scale and softcap_scale carry the factor log2(e), and so does the sink here."""
    row = tl.load(tiles + 2 * tl.program_id(0))
    m_from = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    query_start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - query_start
    context = tl.load(context_lens + row)

    m = m_from + tl.arange(0, BLOCK_M)
    live = m < query_len * GROUP
    token = (query_start + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    position = context - query_len + m // GROUP
    first = context - query_len + m_from // GROUP
    last = context - query_len + tl.minimum((m_from + BLOCK_M - 1) // GROUP, query_len - 1)

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    q_at = q + token[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :]
    q_block = tl.load(q_at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)

    # The sink is one more logit with a value of zero: the running sum starts from it instead of from nothing.
    if HAS_SINKS:
        top = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.full((BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)

    reach = 0
    if HAS_WINDOW:
        reach = tl.maximum(first - window + 1, 0)
    for n_from in range(reach // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
        n = n_from + tl.arange(0, BLOCK_N)
        # Keys no query of the tile can see are not read: they may be anything, and 0 * NaN is NaN.
        inside = (n >= reach) & (n <= last)
        page = tl.load(page_table + row * page_table_stride + n // PAGE, mask=inside, other=0).to(tl.int64)
        at = (page * PAGE + n % PAGE) * kv_heads + kv_head
        k_at = k_cache + at[None, :] * HEAD_DIM + d[:, None]
        k_block = tl.load(k_at, mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        v_at = v_cache + at[:, None] * VALUE_DIM + e[None, :]
        v_block = tl.load(v_at, mask=inside[:, None] & (e < VALUE_DIM)[None, :], other=0.0)

        scores = tl.dot(q_block, k_block, input_precision="ieee") * score_scale
        if HAS_SOFTCAP:
            scores = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores))) * softcap_scale  # tanh
        seen = n[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a block may hold no key that this query sees
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    total = tl.where(live, total, 1.0)  # a pair beyond the row's last may have seen no key
    out_at = out + (token[:, None] * (kv_heads * GROUP) + head[:, None]) * VALUE_DIM + e[None, :]
    if HAS_LSE:
        tl.store(lse + token * (kv_heads * GROUP) + head, (top + tl.log2(total)) * 0.6931471805599453, mask=live)
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=live[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit
def write_kv_kernel(
    k_cache,
    v_cache,
    k,
    v,
    slot_mapping,
    kv_heads,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies the keys and values of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    i = tl.arange(0, BLOCK_K)
    key = tl.load(
        k + token * k_token_stride + i // HEAD_DIM * k_head_stride + i % HEAD_DIM, mask=i < kv_heads * HEAD_DIM
    )
    tl.store(k_cache + slot * (kv_heads * HEAD_DIM) + i, key, mask=i < kv_heads * HEAD_DIM)
    j = tl.arange(0, BLOCK_V)
    value = tl.load(
        v + token * v_token_stride + j // VALUE_DIM * v_head_stride + j % VALUE_DIM, mask=j < kv_heads * VALUE_DIM
    )
    tl.store(v_cache + slot * (kv_heads * VALUE_DIM) + j, value, mask=j < kv_heads * VALUE_DIM)


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `weft.kernels.paged_attention.write_kv`."""
    tokens, kv_heads, width = k.shape
    if tokens == 0:
        return
    write_kv_kernel[(tokens,)](
        k_cache,
        v_cache,
        k,
        v,
        slot_mapping,
        kv_heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        **write_kv_config(kv_heads, width, v.shape[2]),
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: LogSumExp | None = None,
) -> Tensor:
    """See `weft.kernels.paged_attention.paged_attention`."""
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    out = q.new_empty(tokens, heads, value_dim)
    if tokens == 0:
        return out
    group = heads // kv_heads
    config = attention_config(q.dtype, group, head_dim, value_dim, rows.page_size, group * max(rows.query_lens))
    tiles = _tiles(rows, group, config["BLOCK_M"])
    attention_kernel[(len(tiles), kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        out if lse is None else lse.values,
        q if sinks is None else sinks,
        tiles,
        rows.query_starts,
        rows.context_lens,
        rows.page_table,
        kv_heads,
        scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        rows.page_table.stride(0),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None,
        **config,
    )
    return out


def attention_config(
    dtype: torch.dtype, group: int, head_dim: int, value_dim: int, page: int, longest: int
) -> dict[str, Any]:
    """Block sizes and launch options; `longest` is the most (token, head) pairs of one row and key head."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    exact = dtype == torch.float32  # no tensor cores: smaller blocks and more warps keep it in registers
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "PAGE": page,
        # Never 64: there the second product becomes wgmma with the weights in registers, which ptxas before 13.3
        # miscompiles when pipelined.
        "BLOCK_M": 16 if longest <= 16 else 32,
        "BLOCK_N": min(32, max(16, 4096 // block_d)) if exact else min(64, max(16, 8192 // block_d)),
        "BLOCK_D": block_d,
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "num_warps": 8 if exact else 4,
        "num_stages": 2,
    }


def write_kv_config(kv_heads: int, head_dim: int, value_dim: int) -> dict[str, Any]:
    """Block sizes and launch options of the cache write."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": triton.next_power_of_2(kv_heads * head_dim),
        "BLOCK_V": triton.next_power_of_2(kv_heads * value_dim),
        "num_warps": 4,
    }


def _tiles(rows: AttentionRows, group: int, block: int) -> Tensor:
    """int32 [tiles, 2] on the device: (row, first (token, head) pair of the row)."""

    def build() -> Tensor:
        pairs = [(r, at) for r, query in enumerate(rows.query_lens) for at in range(0, query * group, block)]
        return to_device(np.asarray(pairs, dtype=np.int32), rows.page_table.device)

    return rows.plan(("tiles", group, block), build)


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {
        **dict.fromkeys(("q", "k", "v", "k_cache", "v_cache", "out", "sinks"), VALUES),
        **dict.fromkeys(("query_starts", "context_lens", "page_table"), INTEGERS),
        **dict.fromkeys(("score_scale", "softcap_scale"), FLOAT),
        **dict.fromkeys(("q_token_stride", "q_head_stride", "k_token_stride"), MULTIPLE),
        "lse": FLOATS,
        "slot_mapping": "*i64",
    }
    for dtype, group, width, longest, features in (
        ("bf16", 4, 128, 4, ()),
        ("bf16", 4, 128, 4, ("HAS_LSE",)),
        ("fp16", 4, 128, 2048, ("HAS_LSE",)),
        ("bf16", 4, 128, 2048, ("HAS_WINDOW",)),
        ("bf16", 8, 64, 2048, ("HAS_WINDOW", "HAS_SINKS")),
        ("bf16", 2, 256, 2048, ("HAS_WINDOW", "HAS_SOFTCAP")),
        ("fp16", 1, 80, 512, ()),
        ("fp32", 3, 64, 512, ("HAS_SOFTCAP",)),
        ("fp32", 4, 256, 512, ()),
        ("fp32", 4, 256, 512, ("HAS_LSE",)),
    ):
        config = attention_config(DTYPES[dtype], group, width, width, 16, longest)
        has = {name: name in features for name in ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS", "HAS_LSE")}
        label = " ".join(["attention", f"d {width}", *(name[4:].lower() for name in features)])
        yield Variant(f"{label} rows {config['BLOCK_M']}", attention_kernel, dtype, config | has, arguments)
    yield Variant("write_kv 8 x 128", write_kv_kernel, "bf16", write_kv_config(8, 128, 128), arguments)
