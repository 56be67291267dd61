"""Grouped LoRA of experts: every pair of a token and an expert gets the update its token's adapter has for the expert.

*Semantics*, for every row i (token t, expert e) whose token has a slot s of rank r > 0 at the site:

    y[i] += B[s, e] (A[s, e] x[i])

Sums and roundings are those of grouped LoRA, and so are the kernels: an expert of a slot is an entry of the tables,
as a slot is elsewhere.
"""

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

__all__ = ["grouped_expert_lora"]


def grouped_expert_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """Adds to each row of y, in place, the low-rank update of its slot and expert.

    Args:
        y: [pairs, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [pairs, in] of the same dtype; rows may be strided, a row is contiguous.
        a: the rows of every expert's A, of width in and the same dtype.
        b: the columns of B as rows of width out, every scale folded in; as many as `a` has.
        groups: the pairs, from `expert_groups`.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the tables have no experts.
    """
    rows = groups.num_rows
    if x.shape != (rows, a.width) or y.shape != (rows, b.width):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {rows} rows of experts of widths {a.width} and "
            f"{b.width}"
        )
    if not x.dtype == y.dtype == a.pool.dtype == b.pool.dtype:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, rows of a {a.pool.dtype}, of b {b.pool.dtype}: dtypes must be equal"
        )
    if not a.experts or a.experts != b.experts:
        raise ValueError(f"the tables have {a.experts} and {b.experts} experts: they must have as many, and some")
    if not groups.active:
        return
    if backend(y) == "triton":
        from weft.kernels.grouped_lora.triton import grouped_lora as launch

        launch(y, x, a, b, groups)
        return
    for entry, start, stop in groups.segments:
        slot, expert = divmod(entry, a.experts)
        if a.host_counts[slot]:
            index = groups.order[start:stop].long()
            h = x[index] @ a.of(slot, expert).T
            y.index_copy_(0, index, y[index].addmm_(h, b.of(slot, expert)))
