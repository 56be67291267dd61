"""Attaches forms to mixtures of experts: to routers, and to the linears inside the experts' own computation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.adapters.linear_site import LinearSite
from weft.adapters.mixtures import LinearCalls, expert_weights
from weft.adapters.parts import Part
from weft.adapters.site import ActiveRows
from weft.adapters.slots import SlotPool
from weft.kernels.expert_groups import expert_groups
from weft.kernels.grouped_expert_lora import grouped_expert_lora
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

Factors = tuple[SlotRows, SlotRows]
"""A and B of every slot's experts at one parameter."""


class RouterSite(LinearSite):
    """A router: its scores are a linear of its input, and what it does with them is its own."""

    def forward(self, x: torch.Tensor) -> Any:
        groups = self._rows.tokens
        if groups is None or all(self._active(part, groups) is None for part in Part):
            return self.linear(x)
        tokens = groups

        def add(x: torch.Tensor, y: torch.Tensor) -> None:
            rows = x.view(-1, x.shape[-1])
            if y.dtype == self._pool.dtype:
                self._add_adapters(y.view(-1, y.shape[-1]), rows, tokens)
                return
            # Some routers count in fp32 beside a base of 16 bits, whose adapters have 16 bits too.
            update = torch.zeros_like(y, dtype=self._pool.dtype)
            self._add_adapters(update.view(-1, y.shape[-1]), rows.to(self._pool.dtype), tokens)
            y += update

        with LinearCalls(add):
            return self.linear(x)


class ExpertsSite(nn.Module):
    """The experts of one layer. Where no row's adapter changes them, transformers' own computation is all there is.

    Args:
        experts: a module of transformers' experts interface.
        path: its path in the model.
    """

    def __init__(self, experts: nn.Module, path: str, pool: SlotPool, rows: ActiveRows) -> None:
        super().__init__()
        self.experts: Any = experts
        self._paths = tuple(f"{path}.{name}" for name in expert_weights(experts))
        self._pool = pool
        self._rows = rows

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``x [T, hidden]``; the chosen experts and their weights ``[T, k]``."""
        tokens = self._rows.tokens
        if tokens is not None and tokens.active:
            first, second = (self._factors(path, tokens) for path in self._paths)
            if first is not None or second is not None:
                return self._adapted(x, index, weights, first, second, tokens)
        result: torch.Tensor = self.experts(x, index, weights)
        return result

    def _factors(self, path: str, tokens: RowGroups) -> Factors | None:
        a, b = self._pool.rows(path, Part.A), self._pool.rows(path, Part.B)
        return None if a is None or b is None or not a.used_by(tokens.active) else (a, b)

    def _adapted(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        first: Factors | None,
        second: Factors | None,
        tokens: RowGroups,
    ) -> torch.Tensor:
        """What ``grouped_mm_experts_forward`` of ``transformers.integrations.moe`` computes, pairs of a token and an
        expert sorted by expert, with the adapters' part added to each product."""
        experts, chosen = self.experts, index.shape[1]
        pairs = index.flatten().argsort(stable=True)
        token, expert = pairs // chosen, index.flatten()[pairs]
        count = experts.num_experts
        counts = torch.zeros(count, dtype=torch.int32, device=x.device)
        counts = counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        groups = expert_groups(tokens, token, expert, experts=count, num_slots=self._pool.num_slots)

        def product(x: torch.Tensor, name: str, factors: Factors | None) -> torch.Tensor:
            weight = getattr(experts, name)
            y = F.grouped_mm(x, weight if experts.is_transposed else weight.mT, offs=ends)
            if experts.has_bias:
                y = y + getattr(experts, f"{name}_bias")[expert]
            if factors is not None:
                grouped_expert_lora(y, x, *factors, groups)
            return y

        up, down = expert_weights(experts)
        h = product(x[token], up, first)
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        y = product(h, down, second)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        y = y * weights.flatten()[pairs].unsqueeze(1)
        # Put back in the order of the tokens and summed, not added into place: the same result on every run.
        y = torch.empty_like(y).index_copy_(0, pairs, y)
        return y.view(*index.shape, -1).sum(1).to(x.dtype)


def attach_mixtures(model: PreTrainedModel, base: Base, pool: SlotPool, rows: ActiveRows) -> None:
    """Replace the routers and experts of ``model`` by sites that look at ``rows``, as ``attach_sites`` does linears."""
    paths = {site.path.rpartition(".")[0]: site for site in base.parameter_sites.values() if site.experts}
    for path in paths:
        model.set_submodule(path, ExpertsSite(model.get_submodule(path), path, pool, rows))
    for path, site in base.parameter_sites.items():
        if site.kind == "router":
            model.set_submodule(path, RouterSite(model.get_submodule(path), path, pool, rows, output=False))
