"""The meaning of paged attention and of the cache write: one row after the other in fp32."""

import torch
from torch import Tensor

from .rows import AttentionRows, LogSumExp


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `weft.kernels.paged_attention.write_kv`."""
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v


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
    out = q.new_empty(*q.shape[:2], v_cache.shape[3])
    starts = rows.query_starts.tolist()
    for r, start in enumerate(starts[:-1]):
        scores, slots = _scores(q, k_cache, rows, r, start, scale, window, softcap, sinks)
        v = v_cache.flatten(0, 1)[slots].float().repeat_interleave(q.shape[1] // k_cache.shape[2], dim=1)
        weights = scores.softmax(dim=-1)[..., : len(slots)]
        out[start : starts[r + 1]] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    if lse is not None:
        write_lse(lse, q, k_cache, rows, scale=scale, window=window, softcap=softcap, sinks=sinks)
    return out


def write_lse(
    lse: LogSumExp,
    q: Tensor,
    k_cache: Tensor,
    rows: AttentionRows,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Writes what is wanted of the denominators."""
    starts = rows.query_starts.tolist()
    for r in lse.rows:
        scores, _ = _scores(q, k_cache, rows, r, starts[r], scale, window, softcap, sinks)
        lse.values[starts[r] : starts[r + 1]] = scores.logsumexp(-1).T


def _scores(
    q: Tensor,
    k_cache: Tensor,
    rows: AttentionRows,
    r: int,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores [heads, queries, keys] of a row whose new tokens begin at `start`, the sink last; where its keys lie."""
    query, total = rows.query_lens[r], rows.total_lens[r]
    at = rows.positions[start : start + query, None]
    first = 0 if window is None else max(0, total - query - window + 1)  # what no token sees is not read
    key = torch.arange(first, total, device=q.device)
    slots = rows.page_table[r, key // rows.page_size].long() * rows.page_size + key % rows.page_size
    k = k_cache.flatten(0, 1)[slots].float().repeat_interleave(q.shape[1] // k_cache.shape[2], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q[start : start + query].float(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = key <= at if window is None else (key <= at) & (key > at - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, query, 1)], dim=-1)
    return scores, slots
