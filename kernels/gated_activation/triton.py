"""Gated activation on a GPU: one launch, a program for each block of elements."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck.triton import activate
from weft.kernels.variants import DTYPES, MULTIPLE, VALUES, Variant


@triton.jit
def gated_activation_kernel(y, gate, up, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(gate) * up over one block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION).to(y.dtype.element_ty).to(tl.float32)
    value = value * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See `weft.kernels.gated_activation.gated_activation`; the two are contiguous and not empty."""
    y, count, config = torch.empty_like(gate), gate.numel(), activation_config(gate.dtype)
    grid = (triton.cdiv(count, config["BLOCK"]),)
    gated_activation_kernel[grid](y, gate, up, count, ACTIVATION=int(activation), **config)
    return y


def activation_config(dtype: torch.dtype) -> dict[str, Any]:
    """Block size and launch options."""
    return {"BLOCK": 4096 // dtype.itemsize, "num_warps": 4}


def variants() -> Iterator[Variant]:
    """See `weft.kernels.variants`."""
    arguments = {"gate": VALUES, "up": VALUES, "count": MULTIPLE}
    for dtype in DTYPES:
        for activation in (Activation.GELU, Activation.GELU_TANH, Activation.SILU):
            config = activation_config(DTYPES[dtype]) | {"ACTIVATION": int(activation)}
            name = f"gated activation {activation.name.lower()}"
            yield Variant(name, gated_activation_kernel, dtype, config, arguments)
