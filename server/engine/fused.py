"""Fused kernels in place of several operators, in norms and feed-forward networks that are found to compute the same.

Nothing goes by the name of a class: a module is tried on random rows, and what computes none of the formulas known here
keeps its own forward. The modules stay, and so does whatever reads their weights, replaces them or hooks into them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.kernels.activations import Activation, activate
from weft.kernels.gated_activation import gated_activation
from weft.kernels.gated_activation.reference import gated_activation as gated_activation_reference
from weft.kernels.rms_norm import rms_norm
from weft.kernels.rms_norm.reference import rms_norm as rms_norm_reference

Forward = Callable[[torch.Tensor], torch.Tensor]

_FORMULAS = ((0.0, True), (0.0, False), (1.0, False))
"""``offset`` and ``round_first`` of the norms in transformers."""
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ROWS = 64
_SIZES = (-3, 3)
"""Powers of ten between which the random rows lie: a norm's epsilon matters to the smallest, a limit to the largest."""
_ROUNDED_APART = 0.01
"""The share of elements that may differ by one unit in the last place."""


@torch.inference_mode()
def fuse(model: PreTrainedModel, base: Base) -> frozenset[str]:
    """Give modules of ``model`` a fused forward, where they can have one; returns their paths.

    A network looks its linears up at every call: sites may be put in their places later.
    """
    forwards = {path: _norm(model.get_submodule(path)) for path in base.norms}
    for path, module in model.named_modules():
        if all(f"{path}.{name}" in base.sites for name in _LINEARS):
            forwards[path] = _network(module, base.sites[f"{path}.gate_proj"].in_features, base.dtype)
    fused = {path: forward for path, forward in forwards.items() if forward is not None}
    for path, forward in fused.items():
        model.get_submodule(path).forward = forward
    return frozenset(fused)


def _norm(norm: Any) -> Forward | None:
    """The fused forward of an RMS norm."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or getattr(norm, "bias", None) is not None or not _takes_rows_alone(norm):
        return None
    x = _random_rows(len(norm.weight), norm.weight)
    weight = x[0, _ROWS // 2]  # of about unit size; its own may be all ones, for which the formulas agree
    y = functional_call(norm, {"weight": weight}, (x,))
    for offset, round_first in _FORMULAS:
        options: dict[str, Any] = {"eps": eps, "offset": offset, "round_first": round_first}
        if _equal(rms_norm_reference(x, weight, **options), y):
            return partial(_normed, norm, norm.forward, partial(rms_norm, **options))
    return None


def _normed(norm: Any, own: Forward, fused: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = norm.weight
    return fused(x, weight) if x.dtype == weight.dtype else own(x)  # it was tried on rows of its weight's dtype


def _network(network: Any, width: int, dtype: torch.dtype) -> Forward | None:
    """The fused forward of a network that computes ``down(act(gate(x)) * up(x))``."""
    act_fn = getattr(network, "act_fn", None)
    if not isinstance(act_fn, nn.Module) or not _takes_rows_alone(network):
        return None
    x = _random_rows(width, torch.empty(0, dtype=dtype, device=next(network.parameters()).device))
    activation = next((known for known in Activation if _equal(activate(x, known), act_fn(x))), None)
    if activation is None or not _equal(_passed(network, gated_activation_reference, activation, x), network(x)):
        return None
    return partial(_passed, network, gated_activation, activation)


def _passed(network: Any, gated: Callable[..., torch.Tensor], activation: Activation, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = network.down_proj(gated(network.gate_proj(x), network.up_proj(x), activation))
    return y


def _takes_rows_alone(module: nn.Module) -> bool:
    return len(signature(module.forward).parameters) == 1


def _random_rows(width: int, like: torch.Tensor) -> torch.Tensor:
    """``[1, rows, width]`` of many sizes, with means other than 0, of the dtype and on the device of ``like``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _ROWS, width, generator=generator) + torch.randn(_ROWS, 1, generator=generator)
    return (rows * torch.logspace(*_SIZES, _ROWS)[:, None]).to(like)


def _equal(ours: torch.Tensor, theirs: object) -> bool:
    """Whether the two are the same bit for bit, but for rounding here and there."""
    if not isinstance(theirs, torch.Tensor) or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    whole = torch.int32 if ours.dtype == torch.float32 else torch.int16
    apart = (ours.view(whole).long() - theirs.contiguous().view(whole).long()).abs()
    return int(apart.max()) <= 1 and float(apart.count_nonzero()) <= _ROUNDED_APART * apart.numel()
