"""Rows with one new token each, by kernels in C: keys and values are read where they lie, once, for all heads."""

import ctypes

import torch
from torch import Tensor

from weft.kernels import native

from .rows import AttentionRows

SOURCE = "paged_attention/decode.c"

_POINTER, _INT, _FLOAT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_ssize_t


class _Decode(ctypes.Structure):
    """`Decode` of decode.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k_cache", "v_cache", "out", "tokens", "lengths", "pages", "sinks")),
        *((name, _INT) for name in ("rows", "max_pages", "page_size", "heads", "kv_heads", "d", "d_v", "window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _STRIDE) for name in ("stride_token", "stride_head")),
        *((name, _INT) for name in ("kind", "threads")),
    )


def supported(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernel serves these tensors here."""
    contiguous = k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1
    return q.dtype in native.KINDS and contiguous and native.available(SOURCE)


def write(cache: Tensor, new: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys or values [T, kv_heads, d] into a cache that is contiguous; the last dimension of `new` is."""
    size = new.element_size()
    tokens, heads, width = new.shape
    types = (*[_POINTER] * 3, _INT, _INT, *[_STRIDE] * 3, _INT)
    native.function(SOURCE, "write_cache", *types)(
        cache.data_ptr(),
        new.data_ptr(),
        slot_mapping.data_ptr(),
        tokens,
        heads,
        width * size,
        new.stride(0) * size,
        new.stride(1) * size,
        torch.get_num_threads(),
    )


def attend(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Writes to `out` [T, heads, d_v] what `paged_attention` says of the rows that have one new token.

    Raises:
        MemoryError: there is none for the sums of all rows.
    """
    tokens, lengths, pages = rows.plan("decode", lambda: _decoding(rows))
    if not len(tokens):
        return
    sinks = None if sinks is None else sinks.float().contiguous()
    arguments = _Decode(
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        out=out.data_ptr(),
        tokens=tokens.data_ptr(),
        lengths=lengths.data_ptr(),
        pages=pages.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        rows=len(tokens),
        max_pages=pages.shape[1],
        page_size=rows.page_size,
        heads=q.shape[1],
        kv_heads=k_cache.shape[2],
        d=q.shape[2],
        d_v=v_cache.shape[3],
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
        stride_token=q.stride(0),
        stride_head=q.stride(1),
        kind=native.KINDS[q.dtype],
        threads=torch.get_num_threads(),
    )
    if native.function(SOURCE, "decode", ctypes.c_void_p)(ctypes.addressof(arguments)):
        raise MemoryError(f"no memory for attention of {len(tokens)} rows")


def _decoding(rows: AttentionRows) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [R] tokens, [R] lengths and [R, pages] of the rows with one new token."""
    chosen = torch.tensor([r for r, query in enumerate(rows.query_lens) if query == 1], dtype=torch.long)
    pages = torch.from_numpy(rows.page_tables)
    starts, lengths = rows.query_starts.index_select(0, chosen), rows.context_lens.index_select(0, chosen)
    return starts, lengths, pages.index_select(0, chosen)
