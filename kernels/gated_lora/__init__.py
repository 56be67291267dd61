"""Gated LoRA: every row of a batch gets low-rank updates of its adapter, each weighed by a gate of the row.

*Semantics*, for every row t whose slot s is not -1 and has n > 0 gates, and for g the row's gates:

    y[t] += sum_e g[t, e] B[s][e] (A[s][e] x[t])            e from 0 to n - 1

B holds what belongs to the gates one after the other, of equal rank, and so does A, unless it has no more rows than one
of them: then all share it. Sums are in fp32; the weighed vector between the two products is rounded once to x's dtype,
y once. Rows of slot -1 and rows whose slot has no gates are left as they are, bit for bit.
"""

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

from . import reference

__all__ = ["gated_lora"]


def gated_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, gate: SlotRows, gates: Tensor, groups: RowGroups
) -> None:
    """Adds to each row of y, in place, the weighed updates of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        a: the rows of A, of width in and the same dtype: as many as `b` has, or as one gate has in it.
        b: the columns of B as rows of width out, every scale folded in.
        gate: what `gates` were made of; a slot has one row more than it has gates.
        gates: fp32 [T, n] of `mean_gates`.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    rows = groups.num_rows
    if x.shape != (rows, a.width) or y.shape != (rows, b.width) or gates.shape != (rows, gate.max_count - 1):
        raise ValueError(
            f"x {tuple(x.shape)}, y {tuple(y.shape)} and gates {tuple(gates.shape)} do not fit {rows} rows of a site "
            f"of widths {a.width} and {b.width}"
        )
    for down, up, own in zip(a.host_counts, b.host_counts, gate.host_counts, strict=True):
        if up and (own < 2 or up % (own - 1) or down not in (up, up // (own - 1))):
            raise ValueError(f"{own - 1} gates cannot share {down} rows of a and {up} of b equally")
    if not x.dtype == y.dtype == a.pool.dtype == b.pool.dtype:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, rows of a {a.pool.dtype}, of b {b.pool.dtype}: dtypes must be equal"
        )
    if backend(y) == "triton":
        from .triton import gated_lora as launch

        launch(y, x, a, b, gate, gates, groups)
    else:
        reference.gated_lora(y, x, a, b, gate, gates, groups)
