"""Gated prefix: every query also attends, in a softmax of its own, to a few keys of its row's adapter.

*Semantics*, for every row t whose slot s is not -1 and has n > 0 values, and every query head h with its key head g:

    y[t, h] += sum_j softmax_j(q[t, h] . K[s][j, g]) V[s][j, g]

The scale of the scores is folded into the keys, the gate into the values.

Joined with the row's own attention, of whose output y[t, h] and denominator exp(L[t, h]) there is, it becomes

    y[t, h] = (exp(L) y[t, h] + sum_j exp(u[t, 0] c q[t, h] . K[s][j, g]) u[t, 1] V[s][j, g]) /
              (exp(L) + sum_j exp(u[t, 0] c q[t, h] . K[s][j, g]))

with c the attention's scale and u gates of the row: one softmax over both. Scores, softmax and sums are in fp32,
rounded once to y's dtype. Rows of slot -1 and rows whose slot has no values are left as they are, bit for bit.
"""

from dataclasses import dataclass

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

from . import reference

__all__ = ["Joint", "gated_prefix"]


@dataclass(frozen=True, eq=False)
class Joint:
    """What joins a prefix and the attention that ran before to one softmax.

    Attributes:
        lse: L, fp32 [T, heads], contiguous, of rows whose slots have a prefix; else it may be anything.
        gates: u, fp32 [T, 2], contiguous.
        scale: c.
    """

    lse: Tensor
    gates: Tensor
    scale: float


def gated_prefix(
    y: Tensor, q: Tensor, keys: SlotRows, values: SlotRows, groups: RowGroups, joint: Joint | None = None
) -> None:
    """Adds to each row of y, in place, what the row's queries find in the prefix of the row's slot.

    Args:
        y: [T, heads * d] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        q: [T, heads, d] of the same dtype; strided but for the last dimension.
        keys, values: rows of width kv_heads * d and of the same dtype; a slot that has values has as many keys.
        groups: the rows of this step.
        joint: what makes one softmax of both; y is then what attention returned.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    heads, width = q.shape[1:]
    kv_heads = keys.width // width
    grouped = kv_heads and keys.width == values.width == kv_heads * width and heads % kv_heads == 0
    if not grouped or y.shape != (groups.num_rows, heads * width) or len(q) != len(y):
        raise ValueError(
            f"y {tuple(y.shape)} and q {tuple(q.shape)} do not fit {groups.num_rows} rows and a prefix of widths "
            f"{keys.width} and {values.width}"
        )
    if any(n not in (0, have) for n, have in zip(values.host_counts, keys.host_counts, strict=True)):
        raise ValueError(f"slots have {values.host_counts} values, but {keys.host_counts} keys")
    if not y.dtype == q.dtype == keys.pool.dtype == values.pool.dtype:
        raise ValueError(
            f"y {y.dtype}, q {q.dtype}, keys {keys.pool.dtype}, values {values.pool.dtype}: dtypes must be equal"
        )
    if joint is not None and (joint.lse.shape != q.shape[:2] or joint.gates.shape != (len(q), 2)):
        raise ValueError(
            f"lse {tuple(joint.lse.shape)} and gates {tuple(joint.gates.shape)} do not fit q {tuple(q.shape)}"
        )
    if backend(y) == "triton":
        from .triton import gated_prefix as launch

        launch(y, q, keys, values, groups, joint)
    else:
        reference.gated_prefix(y, q, keys, values, groups, joint)
