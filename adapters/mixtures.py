"""What transformers' mixtures of experts look like: which modules are routers, which hold the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

_EXPERTS_API = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
"""What ``transformers.integrations.moe.use_experts_implementation`` gives a module (version 5.17)."""


class LinearCalls(TorchFunctionMode):
    """While active, hands every call of ``F.linear`` to ``then(x, y)`` after it was made.

    The routers of transformers call it on a parameter of their own, so there is no linear module to replace.
    """

    def __init__(self, then: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._then = then

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._then(args[0] if args else kwargs["input"], result)
        return result


def is_router(module: nn.Module) -> bool:
    """Whether the module is no linear but computes ``x W^T``, once, of a weight ``[out, in]`` of its own: found by
    trying it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return False
    if any(True for _ in module.children()):
        return False
    shapes: list[tuple[int, ...]] = []
    try:
        with torch.no_grad(), LinearCalls(lambda x, y: shapes.append((*x.shape, *y.shape))):
            module(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except Exception:  # a module that is called in another way is none; it may raise whatever it likes
        return False
    return shapes == [(1, weight.shape[1], 1, weight.shape[0])]


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds its experts' linears as transformers' experts interface lays them down."""
    if not all(hasattr(module, name) for name in _EXPERTS_API):
        return False
    weights = [module._parameters.get(name) for name in expert_weights(module)]
    return all(weight is not None and weight.ndim == 3 for weight in weights)


def expert_weights(module: Any) -> tuple[str, str]:
    """Names of the parameters that are applied first and second."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
