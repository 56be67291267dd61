"""The tensors of the paged KV cache, and how much memory they may take."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from weft.server.config import ConfigError, EngineConfig


class KVCache:
    """Keys and values of every layer in pages, page-major: ``[num_blocks + 1, block_size, kv_heads, head_dim]``.

    The last page is nobody's: rows that only fill a captured step up write there.

    Args:
        shapes: per layer ``(kv_heads, key head_dim, value head_dim)``.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [_zeros((num_blocks + 1, block_size, heads, d), dtype, device) for heads, d, _ in shapes]
        self.values = [_zeros((num_blocks + 1, block_size, heads, d), dtype, device) for heads, _, d in shapes]


def bytes_per_block(shapes: list[tuple[int, int, int]], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one page takes in all layers together."""
    return sum(heads * (d_k + d_v) for heads, d_k, d_v in shapes) * block_size * dtype.itemsize


def count_blocks(
    config: EngineConfig, block_bytes: Sequence[int], max_model_lens: Sequence[int], device: torch.device
) -> list[int]:
    """How many pages the configuration pays for: never more than ``max_num_seqs`` rows of full length need.

    Several models get the same number of pages each, since streams that go in step need as many of each model.

    Args:
        block_bytes, max_model_lens: of every model.

    Raises:
        ConfigError: not even one page fits.
    """
    budget = config.kv_cache_memory
    if budget is None:
        budget = _free_memory(config, device)
    blocks = budget // sum(block_bytes)
    if blocks < 1:
        raise ConfigError(f"kv_cache_memory of {budget} bytes does not hold one page of {sum(block_bytes)} bytes")
    return [min(blocks, config.max_num_seqs * -(-length // config.block_size)) for length in max_model_lens]


def _free_memory(config: EngineConfig, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1.0 - config.gpu_memory_utilization) * total))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are pages the kernel hands out on first touch; torch's would be written here and now.
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(shape)
