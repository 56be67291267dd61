"""Paged attention: the new tokens of every row attend to the row's own keys and values, which lie in pages of a cache.

*Semantics*, for a new token at position p of row r and query head h, whose key head is h // (heads / kv_heads):

    s[j] = scale * q[p, h] . k[j]         for j in max(0, p - window + 1) .. p
    s[j] = softcap * tanh(s[j] / softcap)  if softcap is given (Gemma 2)
    out  = sum_j exp(s[j]) v[j] / (sum_j exp(s[j]) + exp(sinks[h]))    the sink only if given (GPT-OSS)

Sums are in fp32. `window` counts the token itself, as `sliding_window` does in transformers. What lies in a page beyond
the row's tokens is never seen, be it NaN.
"""

from torch import Tensor

from weft.kernels.dispatch import backend

from . import cpu
from .rows import AttentionRows, LogSumExp

__all__ = ["AttentionRows", "LogSumExp", "paged_attention", "write_kv"]


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Writes the keys and values of new tokens into the cache.

    Args:
        k_cache: [num_pages, page_size, kv_heads, d], contiguous.
        v_cache: [num_pages, page_size, kv_heads, d_v], contiguous.
        k: [T, kv_heads, d] of the cache's dtype, d contiguous.
        v: [T, kv_heads, d_v] likewise.
        slot_mapping: int64 [T], page * page_size + offset, distinct (`AttentionRows.slot_mapping`).
    """
    if backend(k_cache) == "triton":
        from .triton import write_kv as launch

        launch(k_cache, v_cache, k, v, slot_mapping)
    else:
        cpu.write_kv(k_cache, v_cache, k, v, slot_mapping)


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
    """Attention of the new tokens `q` over the cache, into which their own keys and values are already written.

    Args:
        q: [T, heads, d] fp32, bf16 or fp16, d contiguous.
        k_cache: [num_pages, page_size, kv_heads, d] of the same dtype; kv_heads divides heads.
        v_cache: [num_pages, page_size, kv_heads, d_v] of the same dtype.
        rows: the rows of this step.
        scale: factor of the dot products.
        window: tokens a token sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: [heads], a logit in the softmax's denominator; None for none.
        lse: where the logarithms of the denominators are written, if they are wanted.

    Returns:
        [T, heads, d_v] of q's dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `window` is below 1.
    """
    _check(q, k_cache, v_cache, rows, window, sinks)
    if backend(q) == "triton":
        from .triton import paged_attention as launch
    else:
        launch = cpu.paged_attention
    return launch(q, k_cache, v_cache, rows, scale=scale, window=window, softcap=softcap, sinks=sinks, lse=lse)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, window: int | None, sinks: Tensor | None
) -> None:
    tokens, heads, width = q.shape
    page = (k_cache.shape[1], k_cache.shape[2])
    if tokens != rows.num_tokens or width != k_cache.shape[3] or heads % page[1] or page[0] != rows.page_size:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit {rows.num_tokens} tokens over pages of {rows.page_size} in a cache "
            f"{tuple(k_cache.shape)}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} have different pages")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q {q.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}: dtypes must be equal")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: it must be at least 1, or None")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}: need one logit for each of {heads} heads")
