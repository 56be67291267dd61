"""RMS norm: rows divided by the root of the mean of their squares, and weighed element by element.

*Semantics*, for every row x, in fp32:

    n = x / sqrt(mean(x^2) + eps)
    y = n * (offset + weight)

y is rounded to x's dtype, and with `round_first` n is as well, before the product. Among transformers' norms Llama's
rounds first, OLMo 2's does not, and Gemma's weight is an offset from 1.
"""

import torch
from torch import Tensor

from weft.kernels.dispatch import backend

from . import native, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, round_first: bool) -> Tensor:
    """Normalises over the last dimension.

    Args:
        x: [..., width] fp32, bf16 or fp16; copied first where it is not contiguous.
        weight: [width] of x's dtype, contiguous.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if (weight.shape, weight.dtype) != (x.shape[-1:], x.dtype):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit a weight {tuple(weight.shape)} {weight.dtype}")
    x = x.contiguous()
    if not x.numel():
        return torch.empty_like(x)
    if backend(x) == "triton":
        from .triton import rms_norm as launch

        return launch(x, weight, eps, offset=offset, round_first=round_first)
    serve = native.rms_norm if native.supported(x) else reference.rms_norm
    return serve(x, weight, eps, offset=offset, round_first=round_first)
