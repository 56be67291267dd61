"""Attaches side networks to a model's layers: their state goes into a layer and follows from what the layer makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.adapters.parts import Part
from weft.adapters.side import GATE
from weft.adapters.slots import SlotPool
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Bottlenecks, Input, grouped_bottleneck
from weft.kernels.grouped_lora import grouped_lora
from weft.kernels.groups import RowGroups

PARTS = (Part.DOWN, Part.DOWN_BIAS, Part.UP, Part.UP_BIAS)


@dataclass
class SideRows:
    """The tokens of a forward pass that have a side network, S of them, those of one slot together.

    Attributes:
        index: int64 ``[S]``, tokens of the flat batch.
        groups: of the S.
        state: ``[S, hidden]``, before the layer that comes next.
    """

    index: torch.Tensor
    groups: RowGroups
    state: torch.Tensor


@dataclass
class ActiveSide:
    """What the hooks of all layers look at; no rows: no row of the batch has a side network."""

    rows: SideRows | None = None


class SideHooks:
    """Two hooks of a layer: the one changes what it is given, the other the state; see ``weft.adapters.side``."""

    def __init__(self, path: str, pool: SlotPool, active: ActiveSide) -> None:
        self._path = path
        self._pool = pool
        self._active = active
        self._inputs = torch.full((pool.num_slots,), Input.RESIDUAL, dtype=torch.int32, device=pool.device)
        self._activations = torch.full_like(self._inputs, Activation.GELU)

    def attach(self, layer: nn.Module) -> None:
        """Watch ``layer``, which is given the residual stream first and returns it, or a tuple that begins with it."""
        layer.register_forward_pre_hook(self._inject, with_kwargs=True)
        layer.register_forward_hook(self._update)

    def _rows(self) -> SideRows | None:
        """The rows, if this layer takes part for some of them."""
        rows = self._active.rows
        if rows is None:
            return None
        down = self._pool.rows(self._path, Part.DOWN)
        return rows if down is not None and down.used_by(rows.groups.active) else None

    def _inject(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = self._rows()
        if rows is None:
            return None
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        flat = hidden.reshape(-1, hidden.shape[-1])
        own = flat[rows.index]
        a, b = self._pool.rows(self._path, Part.A), self._pool.rows(self._path, Part.B)
        assert a is not None and b is not None, "a layer that takes part has an injection"
        grouped_lora(own, own - rows.state, a, b, rows.groups)
        changed = flat.index_copy(0, rows.index, own).view_as(hidden)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def _update(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows = self._rows()
        if rows is None:
            return
        whole: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        out = whole.reshape(-1, whole.shape[-1])[rows.index]
        gate = self._through(out, tuple(GATE[part] for part in PARTS), rows).float().sigmoid()
        state = (1.0 - gate) * rows.state.float() + gate * self._through(out, PARTS, rows).float()
        down = self._pool.rows(self._path, Part.DOWN)
        assert down is not None, "as _rows looked"
        if not all(down.host_counts[slot] for slot in rows.groups.active):
            takes_part = down.counts[rows.groups.slots.long()] > 0
            state = torch.where(takes_part.unsqueeze(1), state, rows.state.float())
        rows.state = state.to(rows.state.dtype)

    def _through(self, x: torch.Tensor, parts: tuple[Part, ...], rows: SideRows) -> torch.Tensor:
        """What each row's bottleneck of these parts makes of it; 0 of rows that have none here."""
        down, down_bias, up, up_bias = (self._pool.rows(self._path, part) for part in parts)
        assert down is not None and down_bias is not None and up is not None and up_bias is not None, "one has all four"
        kinds = tuple((Input.RESIDUAL, Activation.GELU) if count else None for count in down.host_counts)
        made = torch.zeros_like(x)
        table = Bottlenecks(down, down_bias, up, up_bias, self._inputs, self._activations, kinds)
        grouped_bottleneck(made, x, table, rows.groups)
        return made


def attach_side(model: PreTrainedModel, base: Base, pool: SlotPool) -> ActiveSide:
    """Watch every layer of ``model``; returns what the hooks look at during a forward pass."""
    active = ActiveSide()
    for path in base.backbone.layers if base.backbone else ():
        SideHooks(path, pool, active).attach(model.get_submodule(path))
    return active
