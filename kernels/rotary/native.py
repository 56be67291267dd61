"""Rotary position embedding on a CPU, by a kernel in C: one pass."""

from ctypes import c_int, c_ssize_t, c_void_p

from torch import Tensor

from weft.kernels import native

from .reference import heads_of_tokens

SOURCE = "rotary/native.c"
_ARGUMENTS = (*[c_void_p] * 4, c_int, c_ssize_t, c_int, c_ssize_t, c_ssize_t, c_int, c_int)


def supported(q: Tensor) -> bool:
    """Whether the kernel serves such a tensor here."""
    return q.dtype in native.KINDS and native.available(SOURCE)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.rotary.rotary`."""
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = heads_of_tokens(x)
    native.function(SOURCE, "rotary", *_ARGUMENTS)(
        y.data_ptr(),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        x.shape[1],
        x.shape[2],
        x.shape[3],
        x.stride(1),
        x.stride(2),
        native.KINDS[x.dtype],
        native.threads(x.numel()),
    )
    return y
