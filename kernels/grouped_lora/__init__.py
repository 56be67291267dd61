"""Grouped LoRA: every row of a batch gets the low-rank update of its own adapter.

*Semantics*, for every row t whose slot s is not -1 and has rank r > 0 at the site:

    y[t] += B[s] (A[s] x[t])

Sums are in fp32. The r-vector between the two products is rounded once to x's dtype, as peft rounds it; the update is
added to y in fp32 and rounded once to y's dtype, where peft rounds twice more (the update and its product with the
scale, which is folded into B here). Rows of slot -1 and rows whose slot has rank 0 are left as they are, bit for bit.
"""

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

from . import native
from .halves import expand, shrink
from .packed import PackedWeights, grouped_lora_packed, pack

__all__ = ["PackedWeights", "expand", "grouped_lora", "grouped_lora_packed", "in_passing", "pack", "shrink"]

Pack = Callable[[SlotRows, SlotRows, Sequence[int]], PackedWeights]


def grouped_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups, *, packing: Pack = pack) -> None:
    """Adds to each row of y, in place, the low-rank update of the row's slot.

    Args:
        y: [T, out] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        x: [T, in] of the same dtype; rows may be strided, a row is contiguous.
        a: the rows of A, of width in and the same dtype.
        b: the columns of B as rows of width out (B is stored transposed), every scale folded in; as many as `a` has.
        groups: the rows of this step.
        packing: called where the active slots' weights are wanted side by side, which a caller may keep.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row's slot has no entry in the tables.
    """
    if not groups.active:
        return
    _check(y, x, a, b, groups)
    if backend(y) == "triton":
        from .triton import grouped_lora as launch

        launch(y, x, a, b, groups)
    elif native.supported(y, x, groups):
        native.grouped_lora_native(y, x, a, b, groups)
    else:
        grouped_lora_packed(y, x, packing(a, b, groups.active), groups)


def in_passing(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> ctypes.Structure | None:
    """`grouped_lora` as an argument of a kernel in C that computes y, and includes `rows.h`.

    Returns:
        None where these rows are done in another way, or no row has anything to add.

    Raises:
        ValueError: as `grouped_lora`.
    """
    if not groups.active:
        return None
    _check(y, x, a, b, groups)
    return native.in_passing(y, x, a, b, groups)


def _check(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    rows = groups.num_rows
    if x.shape != (rows, a.width) or y.shape != (rows, b.width):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {rows} rows of a site of widths {a.width} and "
            f"{b.width}"
        )
    if not x.dtype == y.dtype == a.pool.dtype == b.pool.dtype:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, rows of a {a.pool.dtype}, of b {b.pool.dtype}: dtypes must be equal"
        )
    if groups.active[-1] >= len(a.host_counts):
        raise ValueError(f"groups holds slot {groups.active[-1]}, but the tables have {len(a.host_counts)} slots")
