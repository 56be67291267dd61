"""Weighted sum: rows written as weighed sums of other rows, as the composition of adapters needs it.

*Semantics*, for every i, in fp32 and in the order of j, rounded once to out's dtype:

    out[where[i]] = sum_j weights[i, j] * source[index[i, j]]

A place of `index` that is -1 adds nothing. A single term is a scaled copy.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend

from . import reference

__all__ = ["weighted_sum"]


def weighted_sum(out: Tensor, where: Tensor, source: Tensor, index: Tensor, weights: Tensor) -> None:
    """Writes rows of out in place; all others are left as they are, bit for bit.

    Args:
        out: [rows, width] fp32, bf16 or fp16, a row contiguous.
        where: int32 [n], the rows of out to write, each once.
        source: [source rows, width] of out's dtype, a row contiguous; may be out itself, where no row that is written
            is read. Rows that are not in `index` may hold anything.
        index: int32 [n, terms] contiguous, rows of source, or -1.
        weights: fp32 [n, terms] contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if (source.shape[1], source.dtype) != (out.shape[1], out.dtype):
        raise ValueError(f"rows of {source.shape[1]} {source.dtype} do not fit rows of {out.shape[1]} {out.dtype}")
    if index.shape != weights.shape or len(index) != len(where):
        raise ValueError(f"{len(where)} rows, indices {tuple(index.shape)} and weights {tuple(weights.shape)}")
    if (where.dtype, index.dtype, weights.dtype) != (torch.int32, torch.int32, torch.float32):
        raise ValueError(f"where, index and weights are {where.dtype}, {index.dtype} and {weights.dtype}")
    if not len(where):
        return
    if backend(out) == "triton":
        from .triton import weighted_sum as launch

        launch(out, where, source, index, weights)
        return
    reference.weighted_sum(out, where, source, index, weights)
