"""Routed LoRA: every row of a batch gets the low-rank updates of those of its adapter's experts that it is most alike.

*Semantics*, for every row t whose slot s is not -1 and has E > 0 prototypes P[s], and k = top_k[s]:

    likeness[e] = |P[s][e] . x[t]|,    w = softmax over the k largest of them, 0 elsewhere
    y[t] += sum_e w[e] B[s][e] (A[s][e] x[t])

A and B hold the experts one after the other, of equal rank. Sums are in fp32; the weighted vector between the two
products is rounded once to x's dtype, y once. Rows of slot -1 and rows whose slot has no experts are left as they are,
bit for bit. Arrow (arXiv 2405.11157), with the temperature folded into the prototypes.
"""

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

from . import reference

__all__ = ["MAX_EXPERTS", "routed_lora"]

MAX_EXPERTS = 64
"""Experts of a slot that one tile's likenesses have room for."""


def routed_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, prototypes: SlotRows, top_k: Tensor, groups: RowGroups
) -> None:
    """Adds to each row of y, in place, the weighted updates of the experts of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        a: the rows of all experts' A, of width in and the same dtype.
        b: the columns of all experts' B as rows of width out, every scale folded in; as many as `a` has.
        prototypes: a row of width in for each expert, at most `MAX_EXPERTS`.
        top_k: int32 [slots] on the device, from 1 to the slot's number of experts where it has any.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    rows = groups.num_rows
    if x.shape != (rows, a.width) or y.shape != (rows, b.width) or prototypes.width != a.width:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {rows} rows of a site of widths {a.width} and "
            f"{b.width}, with prototypes of {prototypes.width}"
        )
    for ranks, experts in zip(a.host_counts, prototypes.host_counts, strict=True):
        if experts > MAX_EXPERTS or (ranks % experts if experts else ranks):
            raise ValueError(f"{experts} experts (at most {MAX_EXPERTS}) cannot share {ranks} ranks equally")
    if not x.dtype == y.dtype == a.pool.dtype == b.pool.dtype == prototypes.pool.dtype:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, rows of a {a.pool.dtype}, of b {b.pool.dtype}, prototypes "
            f"{prototypes.pool.dtype}: dtypes must be equal"
        )
    if backend(y) == "triton":
        from .triton import routed_lora as launch

        launch(y, x, a, b, prototypes, top_k, groups)
    else:
        reference.routed_lora(y, x, a, b, prototypes, top_k, groups)
