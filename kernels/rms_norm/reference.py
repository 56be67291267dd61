"""The meaning of the RMS norm: torch's operators in the order in which transformers' norms call them."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, round_first: bool) -> Tensor:
    """See `weft.kernels.rms_norm.rms_norm`."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).float()
    return (normed * (offset + weight.float())).to(x.dtype)
