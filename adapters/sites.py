"""Attaches forms to a model's modules: every linear becomes a site that adds what each row's adapter asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.adapters.slots import SlotPool
from weft.kernels.dispatch import backend
from weft.kernels.grouped_lora import PackedWeights, grouped_lora, grouped_lora_packed, pack
from weft.kernels.groups import RowGroups


@dataclass
class ActiveRows:
    """The rows of the forward pass under way, as the sites see them; a linear is given nothing but ``x``.

    Attributes:
        tokens: groups of all tokens of the flat batch; None outside a forward pass.
        logits: groups of the rows whose logits are wanted, for the output embedding.
    """

    tokens: RowGroups | None = None
    logits: RowGroups | None = None


class LinearSite(nn.Module):
    """A linear of the base and the adapters of the rows that pass through it.

    Args:
        linear: the frozen module, ``nn.Linear`` or transformers' ``Conv1D``.
        path: its path in the model.
        pool: where the adapters' weights are.
        rows: shared by all sites of a model.
        output: whether this is the output embedding, which sees only the rows whose logits are wanted.
    """

    def __init__(self, linear: nn.Module, path: str, pool: SlotPool, rows: ActiveRows, *, output: bool) -> None:
        super().__init__()
        self.linear = linear
        self._path = path
        self._pool = pool
        self._rows = rows
        self._output = output
        self._packed: PackedWeights | None = None
        self._packed_key: tuple[tuple[int, int], ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, which some models read directly."""
        return self.linear.get_parameter("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias, if it has one."""
        return getattr(self.linear, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        groups = self._rows.logits if self._output else self._rows.tokens
        if groups is not None and groups.active:
            self._add_adapters(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), groups)
        return y

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> None:
        ranks = self._pool.ranks(self._path)
        if any(ranks[slot] for slot in groups.active):
            if backend(y) == "triton":
                grouped_lora(y, x, self._pool.pages(self._path), groups)
            else:
                grouped_lora_packed(y, x, self._packed_for(groups), groups)
        bias = self._pool.bias(self._path)
        if bias is not None:
            order = groups.order.long()
            y.index_add_(0, order, bias[groups.slots[order].long()])

    def _packed_for(self, groups: RowGroups) -> PackedWeights:
        """The active slots' weights side by side, kept while neither the slots nor their content change."""
        key = tuple((slot, self._pool.generations[slot]) for slot in groups.active)
        if self._packed is None or key != self._packed_key:
            self._packed = pack(self._pool.pages(self._path), groups.active)
            self._packed_key = key
        return self._packed


def attach_sites(model: PreTrainedModel, base: Base, pool: SlotPool) -> ActiveRows:
    """Replace every linear of ``model`` by a site; returns what the sites look at during a forward pass.

    The base's weights are neither copied nor changed.
    """
    rows = ActiveRows()
    output = model.get_output_embeddings()
    for path in base.sites:
        linear = model.get_submodule(path)
        model.set_submodule(path, LinearSite(linear, path, pool, rows, output=linear is output))
    return rows
