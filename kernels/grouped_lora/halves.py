"""Grouped LoRA in its two halves, so that the first can run beside whatever makes y.

*Semantics*: `expand(y, shrink(x, a, groups), b, groups)` is `grouped_lora(y, x, a, b, groups)`.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

from . import reference


def shrink(
    x: Tensor, a: SlotRows, groups: RowGroups, launch_in: AbstractContextManager[object] | None = None
) -> Tensor:
    """A[s] x[t] of every row t whose slot s has rows of A, for `expand`.

    Args:
        x: [T, in] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        a: the rows of A, of width in and the same dtype.
        groups: the rows of this step.
        launch_in: entered around what computes, not around what allocates: another stream may do the work, and the
            result still belongs to the current one. The caller keeps x until the current stream has waited for it.

    Returns:
        fp32 [splits, adapted rows in the order of `groups`, A's padded count], to be added over the first dimension
        and rounded to x's dtype. What lies beyond a slot's rank is not written.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row's slot has no entry in the table.
    """
    if x.shape != (groups.num_rows, a.width) or x.dtype != a.pool.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit {groups.num_rows} rows of width {a.width} and {a.pool.dtype}"
        )
    _check_slots(a, groups)
    if backend(x) == "triton":
        from .triton import shrink as launch

        return launch(x, a, groups, launch_in)
    return reference.shrink(x, a, groups, launch_in)


def expand(y: Tensor, planes: Tensor, b: SlotRows, groups: RowGroups) -> None:
    """Adds to each row of y, in place, B[s] times what `shrink` returned for it.

    Args:
        y: [T, out] of x's dtype; rows may be strided, a row is contiguous.
        planes: from `shrink`, of the same groups.
        b: the columns of B as rows of width out, every scale folded in; as many as `a` had.
        groups: the rows of this step.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row's slot has no entry in the table.
    """
    if y.shape != (groups.num_rows, b.width) or y.dtype != b.pool.dtype:
        raise ValueError(
            f"y {tuple(y.shape)} {y.dtype} does not fit {groups.num_rows} rows of width {b.width} and {b.pool.dtype}"
        )
    most = planes.shape[2] if planes.ndim == 3 and planes.dtype == torch.float32 else -1
    if most < b.max_count or planes.shape[1] != groups.num_adapted:
        raise ValueError(
            f"planes {tuple(planes.shape)} {planes.dtype} do not fit {groups.num_adapted} rows of ranks up to "
            f"{b.max_count} in fp32"
        )
    _check_slots(b, groups)
    if backend(y) == "triton":
        from .triton import expand as launch

        launch(y, planes, b, groups)
    else:
        reference.expand(y, planes, b, groups)


def _check_slots(rows: SlotRows, groups: RowGroups) -> None:
    if groups.active and groups.active[-1] >= len(rows.host_counts):
        raise ValueError(f"groups holds slot {groups.active[-1]}, but the table has {len(rows.host_counts)} slots")
