"""Attaches bottlenecks and fusions to a model's sublayers: they change what is added to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from weft.adapters.bottlenecks import Bottleneck, Fusion
from weft.adapters.parts import Part
from weft.adapters.slots import SlotPool
from weft.kernels.activations import activate
from weft.kernels.grouped_bottleneck import Bottlenecks, Input, grouped_bottleneck
from weft.kernels.groups import RowGroups
from weft.kernels.mean_gates import mean_gates

if TYPE_CHECKING:  # sites attach these too
    from weft.adapters.site import ActiveRows


class SublayerHooks:
    """Two hooks: the one remembers what the norm before a sublayer is given, the other changes the sublayer's output.

    Hooks, and no module around the sublayer, because models read attributes of their attention.
    """

    def __init__(self, path: str, pool: SlotPool, rows: ActiveRows) -> None:
        self._path = path
        self._pool = pool
        self._rows = rows
        self._residual: torch.Tensor | None = None

    def attach(self, norm: nn.Module, sublayer: nn.Module) -> None:
        """Watch ``norm`` and change what ``sublayer`` returns: a tensor, or a tuple that begins with it."""
        norm.register_forward_pre_hook(self._note)
        sublayer.register_forward_hook(self._add)

    def _note(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        groups = self._rows.tokens
        if groups is not None and self._is_used(groups):
            self._residual = args[0]

    def _is_used(self, groups: RowGroups) -> bool:
        tables = (self._pool.rows(self._path, part) for part in (Part.DOWN, Part.FUSION))
        return any(rows is not None and rows.used_by(groups.active) for rows in tables)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        residual, self._residual = self._residual, None
        groups = self._rows.tokens
        if residual is None or groups is None:
            return
        whole: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        f, r = whole.view(-1, whole.shape[-1]), residual.reshape(-1, whole.shape[-1])
        bottlenecks = self._pool.bottlenecks(self._path)
        if bottlenecks is not None and bottlenecks.down.used_by(groups.active):
            grouped_bottleneck(f, r, bottlenecks, groups, self._gates(f, r, bottlenecks, groups))
        segments = {slot: groups.order[start:stop] for slot, start, stop in groups.segments}
        for slot, fusion in self._pool.fusions(self._path, groups.active):
            index = segments[slot].long()
            f.index_add_(0, index, fused(fusion, fusion.members[0].input.of(f[index], r[index])))

    def _gates(
        self, f: torch.Tensor, r: torch.Tensor, bottlenecks: Bottlenecks, groups: RowGroups
    ) -> torch.Tensor | None:
        """Fp32 ``[T, 1]``, of what each row's bottleneck is given; None where no row's is gated."""
        gate = self._pool.rows(self._path, Part.GATE)
        if gate is None or not gate.used_by(groups.active):
            return None
        spans = self._rows.spans
        assert spans is not None, "a batch with gates has spans"
        inputs = bottlenecks.inputs[groups.slots.clamp(min=0).long()].unsqueeze(1)
        x = torch.where(inputs & Input.OUTPUT > 0, f, 0) + torch.where(inputs & Input.RESIDUAL > 0, r, 0)
        return mean_gates(x, gate, self._pool.numbers(self._path, Part.GATE), spans, groups)


def fused(fusion: Fusion, x: torch.Tensor) -> torch.Tensor:
    """What a fusion adds to the output of a sublayer, for inputs ``[T, hidden]``; see the formula in ``forms``."""
    ups = torch.stack([_passed(member, x) for member in fusion.members])
    query = linear(x, fusion.query, fusion.query_bias)
    scores = (linear(ups, fusion.key, fusion.key_bias) * query).sum(-1, keepdim=True)
    values = ups if fusion.value is None else linear(ups, fusion.value)
    return (scores.softmax(0) * values).sum(0)


def _passed(member: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    return linear(activate(linear(x, member.down, member.down_bias), member.activation), member.up, member.up_bias)
