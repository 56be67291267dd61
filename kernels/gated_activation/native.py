"""Gated activation on a CPU, by a kernel in C: one pass."""

from ctypes import c_int, c_ssize_t, c_void_p

import torch
from torch import Tensor

from weft.kernels import native
from weft.kernels.activations import Activation

SOURCE = "gated_activation/native.c"
ACTIVATIONS = (Activation.GELU, Activation.GELU_TANH, Activation.SILU)
_ARGUMENTS = (*[c_void_p] * 3, c_ssize_t, c_int, c_int, c_int)


def supported(gate: Tensor, activation: Activation) -> bool:
    """Whether the kernel serves such a tensor here."""
    return gate.dtype in native.KINDS and activation in ACTIVATIONS and native.available(SOURCE)


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See `weft.kernels.gated_activation.gated_activation`; the two are contiguous and not empty."""
    y, count = torch.empty_like(gate), gate.numel()
    native.function(SOURCE, "gated_activation", *_ARGUMENTS)(
        y.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        count,
        activation,
        native.KINDS[gate.dtype],
        native.threads(count),
    )
    return y
