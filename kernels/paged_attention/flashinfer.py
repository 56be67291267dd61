"""Paged attention by FlashInfer, where it is installed (`pip install weft[flashinfer]`).

Its wrappers plan every step on the host, from the rows' lengths, so it is nothing for CUDA graphs as weft records them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import Absent, Layer
from .rows import AttentionRows, LogSumExp

WORKSPACE = 128 << 20
"""Bytes for parts of rows, as FlashInfer's documentation advises."""
HEAD_DIMS = (64, 128, 256)
MOST_PLANS = 4
"""Layers of so many kinds keep their plans at a time; each has some MiB."""


class FlashInfer:
    """`BatchPrefillWithPagedKVCacheWrapper`, which takes rows of any number of tokens.

    Args:
        wrapper: makes one on a workspace.
    """

    name = "flashinfer"
    capturable = False

    def __init__(self, wrapper: Callable[[Tensor, str], Any], device: torch.device) -> None:
        self._wrapper = wrapper
        self._device = device
        self._workspace: Tensor | None = None
        self._planned: dict[tuple[Any, ...], tuple[Any, AttentionRows]] = {}

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        """See `Backend`."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it has no {dtype}"
        if layer.sinks:
            return "it has no sinks"
        if layer.head_dim != layer.value_dim or layer.head_dim not in HEAD_DIMS:
            return f"keys of {layer.head_dim} and values of {layer.value_dim} are not both one of {HEAD_DIMS}"
        return None

    def attend(
        self,
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
        """See `weft.kernels.paged_attention.paged_attention`; no sinks or denominators."""
        assert sinks is None and lse is None, "what `unfit` excludes is not asked for"
        kv_heads, width = k_cache.shape[2:]
        key = (q.shape[1], kv_heads, width, q.dtype, scale, window, softcap)
        wrapper, planned = self._planned.get(key, (None, None))
        if wrapper is None:
            if len(self._planned) == MOST_PLANS:
                self._planned.clear()
            wrapper = self._new()
        if planned is not rows:  # a wrapper knows one step: that of all layers of this kind
            wrapper.plan(
                *_lists(rows),
                q.shape[1],
                kv_heads,
                width,
                rows.page_size,
                causal=True,
                sm_scale=scale,
                window_left=-1 if window is None else window - 1,
                logits_soft_cap=softcap,
                q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )
            self._planned[key] = wrapper, rows
        out: Tensor = wrapper.run(q, (k_cache, v_cache))
        return out

    def _new(self) -> Any:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=self._device)
        return self._wrapper(self._workspace, "NHD")


def _lists(rows: AttentionRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32 on the host: where rows start among the tokens and among the pages; the pages; tokens of each last page."""

    def build() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, size = np.asarray(rows.total_lens), rows.page_size
        counts = -(-total // size)
        pages = rows.page_tables[np.arange(rows.page_tables.shape[1]) < counts[:, None]]
        lists = (_starts(np.asarray(rows.query_lens)), _starts(counts), pages, (total - 1) % size + 1)
        queries, tables, indices, last = (torch.from_numpy(each.astype(np.int32)) for each in lists)
        return queries, tables, indices, last

    return rows.plan("flashinfer", build)


def _starts(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(counts)])


def find(device: torch.device) -> FlashInfer:
    """What is installed.

    Raises:
        Absent: nothing.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise Absent("it needs a GPU and a torch that is built for CUDA")
    try:
        wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    except ModuleNotFoundError as error:
        raise Absent(f"there is no package {error.name}: pip install 'weft[flashinfer]'") from error
    return FlashInfer(wrapper, device)
