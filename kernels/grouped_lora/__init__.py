"""Grouped LoRA: every row of a batch gets the low-rank update of its own adapter.

*Semantics*, for every row t whose slot s is not -1 and has rank r > 0 at the site:

    y[t] += B[s] (A[s] x[t])

Sums are in fp32. The r-vector between the two products is rounded once to x's dtype, as peft rounds it; the update is
added to y in fp32 and rounded once to y's dtype, where peft rounds twice more (the update and its product with the
scale, which is folded into B here). Rows of slot -1 and rows whose slot has rank 0 are left as they are, bit for bit.
"""

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups

from .packed import PackedWeights, grouped_lora_packed, pack
from .pages import RankPages

__all__ = ["PackedWeights", "RankPages", "grouped_lora", "grouped_lora_packed", "pack"]


def grouped_lora(y: Tensor, x: Tensor, weights: RankPages, groups: RowGroups) -> None:
    """Adds to each row of y, in place, the low-rank update of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        weights: pools of the same dtype, and the page tables of this site.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row's slot has no entry in the page tables.
    """
    if not groups.active:
        return
    _check(y, x, weights, groups)
    if backend(y) == "triton":
        from .triton import grouped_lora as launch

        launch(y, x, weights, groups)
    else:
        grouped_lora_packed(y, x, pack(weights, groups.active), groups)


def _check(y: Tensor, x: Tensor, weights: RankPages, groups: RowGroups) -> None:
    rows, slots = groups.num_rows, weights.ranks.shape[0]
    if x.shape != (rows, weights.a_pool.shape[2]) or y.shape != (rows, weights.b_pool.shape[2]):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {rows} rows of a site with a_pool "
            f"{tuple(weights.a_pool.shape)} and b_pool {tuple(weights.b_pool.shape)}"
        )
    if not x.dtype == y.dtype == weights.a_pool.dtype == weights.b_pool.dtype:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, a_pool {weights.a_pool.dtype}, b_pool {weights.b_pool.dtype}: "
            "dtypes must be equal"
        )
    if groups.active[-1] >= slots:
        raise ValueError(f"groups holds slot {groups.active[-1]}, but the page tables have {slots} slots")
