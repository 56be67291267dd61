"""Gated activation: what a gated feed-forward network gives to its last linear, as SwiGLU and GeGLU do.

*Semantics*, element by element, each step in fp32 and rounded to the dtype of the two:

    a = activation(gate)
    y = a * up
"""

import torch
from torch import Tensor

from weft.kernels.activations import Activation
from weft.kernels.dispatch import backend

from . import native, reference

__all__ = ["gated_activation"]


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Activates one and multiplies it with the other.

    Args:
        gate, up: of one shape and dtype, fp32, bf16 or fp16; copied first where they are not contiguous.

    Returns:
        A tensor of their shape and dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} does not fit up {tuple(up.shape)} {up.dtype}")
    gate, up = gate.contiguous(), up.contiguous()
    if not gate.numel():
        return torch.empty_like(gate)
    if backend(gate) == "triton":
        from .triton import gated_activation as launch

        return launch(gate, up, activation)
    serve = native.gated_activation if native.supported(gate, activation) else reference.gated_activation
    return serve(gate, up, activation)
