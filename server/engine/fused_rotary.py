"""One kernel in place of the rotary embedding's operators, in attention that is found to rotate as the kernel does.

Models call a function of their module for it, which no module holds and nothing can hook into. So an attention's
forward is run with other globals, of which that function is the only one that differs: for this model alone, where a
function put into transformers' module would be everybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.kernels.rotary import fits, rotary
from weft.kernels.rotary.reference import rotary as rotary_reference

NAME = "apply_rotary_pos_emb"
"""What transformers' models call it."""
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def fuse_rotary(model: PreTrainedModel) -> frozenset[str]:
    """Let modules of ``model`` rotate with the kernel, where it computes the same; returns their paths."""
    fused = set()
    for path, module in model.named_modules():
        forward = type(module).forward
        if isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and _rotates(forward, model):
            module.forward = MethodType(_with_kernel(forward), module)
            fused.add(path)
    return frozenset(fused)


def _rotates(forward: FunctionType, model: nn.Module) -> bool:
    """Whether the function that a forward calls does the same to random queries and keys, bit for bit."""
    like = next(model.parameters())
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(shape, generator=generator) for shape in ((1, 3, 5, 16), (1, 1, 5, 16), (1, 5, 16), (1, 5, 16))
    ]
    q, k, cos, sin = (tensor.to(like.device, dtype) for tensor in given)
    try:
        theirs = forward.__globals__[NAME](q, k, cos, sin)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    ours = rotary_reference(q, k, cos, sin)
    return len(theirs) == 2 and all(map(_same, ours, theirs))


def _same(ours: torch.Tensor, theirs: object) -> bool:
    return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _with_kernel(forward: FunctionType) -> FunctionType:
    """The same code with the kernel under the function's name."""
    own: Rotate = forward.__globals__[NAME]

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        if more or named or not fits(q, k, cos, sin):
            return own(q, k, cos, sin, *more, **named)
        return rotary(q, k, cos, sin)

    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
