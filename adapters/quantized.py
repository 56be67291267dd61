"""Linears whose weight is kept in 4 or 8 bits, and the weight they stand for (leaf).

bitsandbytes' 4-bit linear is used as it is: it multiplies with the dequantised weight. Its 8-bit one is not: LLM.int8()
also rounds the activations, and which columns it spares is decided by all rows of a batch together (arXiv 2208.07339),
so a row's result would depend on its neighbours. ``Int8Linear`` keeps the same 8 bits and multiplies exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Int8Linear(nn.Module):
    """``y = W x + b`` with ``W = s q / 127``: what bitsandbytes itself computes when it trains on a CPU.

    Args:
        weight: q, int8 ``[out, in]``.
        scale: s, fp32 ``[out]``: the largest magnitude of each row.
        bias: ``[out]``, in the serving dtype.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """W ``[out, in]``, rounded once."""
        return self.weight.to(dtype).mul_(self.scale.unsqueeze(1) * (1.0 / 127.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantized(x.dtype), self.bias)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is no tensor of numbers to calculate with."""
    four_bit = isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"
    return four_bit or isinstance(module, Int8Linear)


def dequantized(module: Any) -> torch.Tensor:
    """The weight ``[out, in]`` a quantised linear multiplies with, on its device; 4-bit ones as peft reads them."""
    if isinstance(module, Int8Linear):
        return module.dequantized(torch.float32)
    # Imported here: it brings bitsandbytes along, which a plain base does without.
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: torch.Tensor = dequantize_bnb_weight(module.weight)
    return weight


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers the model has learned, those packed into bytes included; a tied one counts once."""
    sizes: dict[torch.Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, Int8Linear | nn.Linear) and is_quantized(module):
            sizes[module.weight] = module.in_features * module.out_features
    return sum(sizes.get(parameter, parameter.numel()) for parameter in model.parameters())
