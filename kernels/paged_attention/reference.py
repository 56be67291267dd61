"""The meaning of paged attention and of the cache write: one row after the other in fp32."""

import torch
from torch import Tensor

from .rows import AttentionRows


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
) -> Tensor:
    """See `weft.kernels.paged_attention.paged_attention`."""
    group = q.shape[1] // k_cache.shape[2]
    out = q.new_empty(*q.shape[:2], v_cache.shape[3])
    start = 0
    for r, (query, total) in enumerate(zip(rows.query_lens, rows.total_lens, strict=True)):
        at = rows.positions[start : start + query, None]
        first = 0 if window is None else max(0, total - query - window + 1)  # what no token sees is not read
        key = torch.arange(first, total, device=q.device)
        slots = rows.page_table[r, key // rows.page_size].long() * rows.page_size + key % rows.page_size
        k = k_cache.flatten(0, 1)[slots].float().repeat_interleave(group, dim=1)
        v = v_cache.flatten(0, 1)[slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start : start + query].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = key <= at if window is None else (key <= at) & (key > at - window)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, query, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(key)]
        out[start : start + query] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        start += query
    return out
