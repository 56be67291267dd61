"""The meaning of the weighted sum: one term of all rows after the other; the CPU path."""

import torch
from torch import Tensor


def weighted_sum(out: Tensor, where: Tensor, source: Tensor, index: Tensor, weights: Tensor) -> None:
    """See `weft.kernels.weighted_sum.weighted_sum`."""
    total = torch.zeros(len(where), out.shape[1], device=out.device)
    for rows, weight in zip(index.T, weights.T, strict=True):
        (present,) = (rows >= 0).nonzero(as_tuple=True)
        term = source.index_select(0, rows[present].long()).float() * weight[present, None]
        total.index_add_(0, present, term)
    out.index_copy_(0, where.long(), total.to(out.dtype))
