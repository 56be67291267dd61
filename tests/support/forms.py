"""Compiled forms applied by hand, one adapter to a plain transformers model: what the engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from weft.adapters.forms import CompiledAdapter, SiteForms


def dense_delta(forms: SiteForms) -> torch.Tensor:
    """``B A``, ``[out, in]`` in fp64: what the adapter adds to the weight of an ``nn.Linear``."""
    assert forms.low_rank is not None
    return forms.low_rank.b.double() @ forms.low_rank.a.double()


@contextmanager
def applied(model: nn.Module, adapter: CompiledAdapter) -> Iterator[None]:
    """Add each site's forms to the output of its module, in fp32."""
    handles = [model.get_submodule(path).register_forward_hook(_hook(forms)) for path, forms in adapter.sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(forms: SiteForms) -> Any:
    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if isinstance(module, nn.Embedding):
            return _embedded(forms, x, output)
        own = {name: getattr(forms, name) for name in ("weight", "bias") if getattr(forms, name) is not None}
        if own:
            twin = deepcopy(module)
            twin._forward_hooks.clear()  # this very hook is among them
            output = functional_call(twin, own, (x,))
        if forms.gain_in is not None:
            output = type(module).forward(module, x * forms.gain_in)
        if forms.gain_out is not None:
            output = output * forms.gain_out
        if forms.shift is not None:
            output = output + forms.shift
        if forms.low_rank is not None:
            output = output + x @ forms.low_rank.a.T @ forms.low_rank.b.T
        if forms.delta is not None:
            output = output + x @ forms.delta.T
        if forms.rows is not None:
            output[..., forms.rows.ids] = x @ forms.rows.vectors.T
        return output

    return add


def _embedded(forms: SiteForms, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if forms.gain_out is not None:
        output = output * forms.gain_out
    if forms.low_rank is not None:
        output = output + forms.low_rank.a.T[ids] @ forms.low_rank.b.T
    if forms.rows is not None:
        for token, vector in zip(forms.rows.ids, forms.rows.vectors, strict=True):
            output = torch.where((ids == token).unsqueeze(-1), vector, output)
    return output
