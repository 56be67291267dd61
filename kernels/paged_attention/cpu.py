"""Paged attention on the CPU: whole pages gathered per bucket of rows, then torch's fused attention.

Gathering keys by token dominates a decode step, so whole pages are copied (one `index_select` over the page-major
cache). The query heads that share a key head are folded into the query length, so that no key is copied per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decode
from .plan import Bucket, plan
from .reference import write_lse
from .rows import AttentionRows, LogSumExp


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `weft.kernels.paged_attention.write_kv`."""
    for cache, new in ((k_cache, k), (v_cache, v)):
        if decode.supported(new, cache, cache):
            decode.write(cache, new, slot_mapping)
        else:
            cache.flatten(0, 1).index_copy_(0, slot_mapping, new)


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
    if lse is not None:  # the fused attention keeps them to itself
        write_lse(lse, q, k_cache, rows, scale=scale, window=window, softcap=softcap, sinks=sinks)
    out = q.new_empty(*q.shape[:2], v_cache.shape[3])
    native = decode.supported(q, k_cache, v_cache)
    if native:
        decode.attend(out, q, k_cache, v_cache, rows, scale=scale, window=window, softcap=softcap, sinks=sinks)
    for bucket in plan(rows, window, q.dtype, decode=not native):
        tokens = bucket.tokens
        queries = q.index_select(0, tokens) if isinstance(tokens, Tensor) else q[tokens]
        queries = queries.unflatten(0, (bucket.num_rows, bucket.query_len))
        keys, values = _gather(k_cache, bucket), _gather(v_cache, bucket)
        if softcap is None and sinks is None:
            result = _fused(queries, keys, values, bucket, scale).flatten(0, 1)
        else:
            result = _plain(queries, keys, values, bucket, scale, softcap, sinks).flatten(0, 1)
        if isinstance(tokens, Tensor):
            out.index_copy_(0, tokens, result)
        else:
            out[tokens] = result
    return out


def _gather(cache: Tensor, bucket: Bucket) -> Tensor:
    """[rows, length, kv_heads, d] of the bucket's rows, zero where a row has no token."""
    flat = cache.index_select(0, bucket.pages).flatten(0, 1)  # [tokens, kv_heads, d]
    if bucket.empty is not None:
        # A recycled page may hold NaN, and 0 * NaN is NaN. Filled as words, which takes a third of the time.
        values = flat.flatten(1)
        whole = values.shape[1] * values.element_size() % 8 == 0
        (values.view(torch.int64) if whole else values).index_fill_(0, bucket.empty, 0)
    return flat.view(bucket.num_rows, -1, *cache.shape[2:])[:, : bucket.length]


def _fused(queries: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """[rows, query_len, heads, d_v] by torch's fused attention."""
    _, query_len, heads, _ = queries.shape
    kv_heads = keys.shape[2]
    if query_len == 1:
        folded = queries.squeeze(1).unflatten(1, (kv_heads, -1))
        result = F.scaled_dot_product_attention(
            folded, keys.transpose(1, 2), values.transpose(1, 2), bucket.mask, scale=scale
        )
        return result.reshape(-1, 1, heads, values.shape[3])
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if kv_heads < heads:
        keys, values = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
    result = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, bucket.mask, is_causal=bucket.causal, scale=scale
    )
    return result.transpose(1, 2)


def _plain(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bucket: Bucket,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[rows, query_len, heads, d_v] in fp32, for scores the fused attention has no words for."""
    rows, query_len, heads, width = queries.shape
    kv_heads, length = keys.shape[2], keys.shape[1]
    folded = queries.float().reshape(rows, query_len, kv_heads, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (folded @ keys.float().permute(0, 2, 3, 1)).view(rows, heads, query_len, length) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bucket.causal:
        scores = scores.masked_fill(torch.ones(query_len, length, dtype=torch.bool).tril().logical_not(), float("-inf"))
    elif bucket.mask is not None:
        scores = scores + bucket.mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, heads, 1, 1).expand(rows, -1, query_len, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length]
    result = weights.view(rows, kv_heads, -1, length) @ values.float().transpose(1, 2)
    return result.view(rows, heads, query_len, -1).transpose(1, 2).to(queries.dtype)
