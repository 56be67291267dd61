"""Paged attention by FlashAttention, as torch has it: `torch.nn.attention.varlen.varlen_attn` on a block table.

torch comes with version 2, whose pages must be multiples of 256 tokens. On Hopper and Blackwell it calls version 3 or 4
in its place where these are installed, which take pages of any size.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from .backends import Absent, Layer
from .rows import AttentionRows, LogSumExp

NEEDED = ("seqused_k", "block_table", "num_splits")
"""Arguments of `varlen_attn` that torch 2.12 has and earlier ones have not."""
FURTHER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}
"""Versions that are packages of their own, by the compute capability they are written for."""
PAGE_OF_VERSION_2 = 256


@dataclass(frozen=True)
class Varlen:
    """`varlen_attn`.

    Attributes:
        version: of FlashAttention: "FA2", "FA3" or "FA4".
        call: `varlen_attn` itself.
    """

    version: str
    call: Callable[..., Any]
    name: str = "varlen"
    capturable: bool = True

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        """See `Backend`."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it has no {dtype}"
        if layer.softcap is not None or layer.sinks:
            return "it has no soft caps and no sinks"
        if layer.head_dim != layer.value_dim or layer.head_dim % 8 or layer.head_dim > 256:
            return f"keys of {layer.head_dim} and values of {layer.value_dim} are not one multiple of 8 up to 256"
        if self.version == "FA2" and page_size % PAGE_OF_VERSION_2:
            return f"FlashAttention 2 needs pages of a multiple of {PAGE_OF_VERSION_2} tokens (block_size)"
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
        """See `weft.kernels.paged_attention.paged_attention`; no soft cap, sinks or denominators."""
        assert softcap is None and sinks is None and lse is None, "what `unfit` excludes is not asked for"
        decoding, grouped = rows.decoding, q.shape[1] > k_cache.shape[2]
        # The page table's width bounds the keys. In a CUDA graph it is fixed, and the rows' lengths are not known.
        most = rows.page_table.shape[1] * rows.page_size
        # A row's only token sees all keys. FlashAttention 2 folds query heads into the length if no side is bounded.
        left, right = (-1, -1 if decoding else 0) if window is None else (window - 1, 0)
        # Only then may it cut keys into parts: else the results of all rows but the first would be lost
        # (https://github.com/pytorch/pytorch/issues/194167).
        safe = self.version != "FA2" or (decoding and grouped and window is None)
        out: Tensor = self.call(
            q,
            k_cache,
            v_cache,
            rows.query_starts,
            _capacities(rows, most) if self.version == "FA2" else None,
            1 if decoding else max(rows.query_lens),
            most,
            scale=scale,
            window_size=(left, right),
            enable_gqa=grouped,
            seqused_k=rows.context_lens,
            block_table=rows.page_table,
            num_splits=None if safe else 1,
        )
        return out.contiguous()  # it has q's strides


def _capacities(rows: AttentionRows, most: int) -> Tensor:
    """int32 [R + 1]: where rows of `most` keys would start, which version 2 wants beside the lengths it goes by."""
    count = rows.context_lens.shape[0]

    def build() -> Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=rows.context_lens.device) * most

    return rows.plan(("varlen", most), build)


def find(device: torch.device) -> Varlen:
    """What this torch and GPU have.

    Where a version of FlashAttention for just this GPU is installed and none was activated, it is activated: for the
    whole process, since torch knows no other way.

    Raises:
        Absent: torch is too old, or not built for CUDA.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise Absent("it needs a GPU and a torch that is built for CUDA")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Absent(f"torch {torch.__version__} has no varlen_attn") from error
    missing = [name for name in NEEDED if name not in inspect.signature(varlen_attn).parameters]
    if missing:
        raise Absent(f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}")
    return Varlen(_version(device), varlen_attn)


def _version(device: torch.device) -> str:
    active = attention.current_flash_attention_impl()
    name, module = FURTHER.get(torch.cuda.get_device_capability(device)[0], ("", ""))
    if active is None and name in attention.list_flash_attention_impls() and _installed(module):
        attention.activate_flash_attention_impl(name)
        active = name
    return active or "FA2"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
