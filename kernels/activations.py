"""The activations that a bottleneck can have, under the numbers that kernels know them by."""

from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional


class Activation(IntEnum):
    """An elementwise function. The kernels branch on the number."""

    IDENTITY = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4
    TANH = 5
    SIGMOID = 6
    LEAKY_RELU = 7


_FUNCTIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        Activation.IDENTITY: torch.Tensor.clone,
        Activation.RELU: functional.relu,
        Activation.GELU: functional.gelu,
        Activation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
        Activation.SILU: functional.silu,
        Activation.TANH: torch.tanh,
        Activation.SIGMOID: torch.sigmoid,
        Activation.LEAKY_RELU: functional.leaky_relu,  # slope 0.01
    }
)


def activate(z: Tensor, activation: Activation) -> Tensor:
    """``activation`` of every element, in z's dtype."""
    return _FUNCTIONS[activation](z)
