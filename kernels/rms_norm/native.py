"""RMS norm on a CPU, by a kernel in C: rows are read twice, the second time from the cache."""

from ctypes import c_float, c_int, c_ssize_t, c_void_p

import torch
from torch import Tensor

from weft.kernels import native

SOURCE = "rms_norm/native.c"
_ARGUMENTS = (*[c_void_p] * 3, c_ssize_t, c_ssize_t, c_float, c_float, c_int, c_int, c_int)


def supported(x: Tensor) -> bool:
    """Whether the kernel serves this tensor here."""
    return x.dtype in native.KINDS and native.available(SOURCE)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, round_first: bool) -> Tensor:
    """See `weft.kernels.rms_norm.rms_norm`; x is contiguous and not empty."""
    y, width, count = torch.empty_like(x), x.shape[-1], x.numel()
    native.function(SOURCE, "rms_norm", *_ARGUMENTS)(
        y.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        count // width,
        width,
        eps,
        offset,
        round_first,
        native.KINDS[x.dtype],
        native.threads(count),
    )
    return y
