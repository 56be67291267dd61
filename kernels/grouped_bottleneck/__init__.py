"""Grouped bottleneck: every row of a batch passes through the bottleneck of its own adapter.

*Semantics*, for every row t whose slot s has a bottleneck, with f the output of a sublayer and r the residual stream
before it:

    f[t] += U[s] act[s](D[s] x + b[s]) + c[s],   x = f[t], r[t] or f[t] + r[t] as input[s] says

or, with gates, g[t, 0] times what is added there. Sums are in fp32. x and the activation are rounded once to f's dtype,
and so is the result. Rows of slot -1 and rows whose slot has no bottleneck are left as they are, bit for bit.
"""

from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from weft.kernels.activations import Activation, activate
from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["Bottlenecks", "Input", "grouped_bottleneck"]


class Input(IntFlag):
    """What a bottleneck is given: the sublayer's output, the residual stream before it, or their sum."""

    OUTPUT = 1
    RESIDUAL = 2
    SUM = 3

    def of(self, output: Tensor, residual: Tensor) -> Tensor:
        """x, of the same shape as both."""
        if self is Input.SUM:
            return output + residual
        return output if self is Input.OUTPUT else residual


@dataclass(frozen=True, eq=False)
class Bottlenecks:
    """The bottleneck every slot has at one sublayer of width `hidden`; a slot without one has no rows of `down`.

    Attributes:
        down: D, one row for each unit.
        down_bias: b, element j in row j // hidden at column j % hidden.
        up: the columns of U as rows (U is stored transposed), every scale folded in.
        up_bias: c, one row, likewise scaled.
        inputs, activations: int32 [slots] on the device, of `Input` and `Activation`.
        host_kinds: both on the host; None where a slot has no bottleneck.
    """

    down: SlotRows
    down_bias: SlotRows
    up: SlotRows
    up_bias: SlotRows
    inputs: Tensor
    activations: Tensor
    host_kinds: tuple[tuple[Input, Activation] | None, ...]


def grouped_bottleneck(
    f: Tensor, r: Tensor, bottlenecks: Bottlenecks, groups: RowGroups, gates: Tensor | None = None
) -> None:
    """Adds to each row of f, in place, what the bottleneck of the row's slot makes of it.

    Args:
        f: [T, hidden] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        r: [T, hidden] of the same dtype; rows may be strided, a row is contiguous.
        bottlenecks: rows of width hidden and of the same dtype.
        groups: the rows of this step.
        gates: fp32 [T, 1 or more], what the change of each row is multiplied by.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if gates is not None and (gates.dtype != torch.float32 or len(gates) != len(f)):
        raise ValueError(f"gates {tuple(gates.shape)} of {gates.dtype} do not fit f {tuple(f.shape)}: need fp32 rows")
    _check(f, r, bottlenecks, groups)
    if not groups.active:
        return
    if backend(f) == "triton":
        from .triton import grouped_bottleneck as launch

        launch(f, r, bottlenecks, groups, gates)
        return
    for slot in groups.active:
        kind = bottlenecks.host_kinds[slot]
        rows = groups.rows_of((slot,)) if kind is not None else None
        if kind is None or rows is None:
            continue
        x = kind[0].of(f[rows], r[rows])
        down = bottlenecks.down.of(slot)
        bias = bottlenecks.down_bias.of(slot).flatten()[: len(down)]
        z = activate(torch.addmm(bias, x, down.T), kind[1])
        change = torch.addmm(bottlenecks.up_bias.of(slot), z, bottlenecks.up.of(slot))
        if gates is not None:
            change = (change.float() * gates[rows, :1]).to(f.dtype)
        if isinstance(rows, slice):
            f[rows] += change
        else:
            f.index_add_(0, rows, change)


def _check(f: Tensor, r: Tensor, bottlenecks: Bottlenecks, groups: RowGroups) -> None:
    parts = (bottlenecks.down, bottlenecks.down_bias, bottlenecks.up, bottlenecks.up_bias)
    if f.shape != r.shape or f.shape[0] != groups.num_rows or {part.width for part in parts} != {f.shape[1]}:
        raise ValueError(
            f"f {tuple(f.shape)} and r {tuple(r.shape)} do not fit {groups.num_rows} rows of bottlenecks of width "
            f"{bottlenecks.down.width}"
        )
    if not {f.dtype, r.dtype} == {part.pool.dtype for part in parts}:
        raise ValueError(f"f {f.dtype}, r {r.dtype}, bottlenecks {bottlenecks.down.pool.dtype}: dtypes must be equal")
