"""Grouped LoRA for few rows, by a kernel in C that reads the weights where they lie in their pools."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from weft.kernels import native
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

SOURCE = "grouped_lora/rows.c"
# Of one slot. Beyond it the weights are read often enough for a product of matrices to be quicker.
FEW_ROWS = 64

_POINTER, _INT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t


class _Lora(ctypes.Structure):
    """`Lora` of rows.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("y", "x", "a", "b", "table_a", "table_b", "order", "segments", "h")),
        *((name, _INT) for name in ("segments_count", "rows", "inputs", "outputs", "most_rank")),
        *((name, _STRIDE) for name in ("stride_x", "stride_y", "stride_table_a", "stride_table_b")),
        *((name, _INT) for name in ("kind", "threads")),
    )


def supported(y: Tensor, x: Tensor, groups: RowGroups) -> bool:
    """Whether the kernel serves these tensors here, and is the quicker way."""
    most = groups.plan("most rows", lambda: max(stop - start for _, start, stop in groups.segments))
    return most <= FEW_ROWS and y.dtype in native.KINDS and y.stride(1) == x.stride(1) == 1 and native.available(SOURCE)


def grouped_lora_rows(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`."""
    segments, most = groups.plan(("ranked", a.host_counts), lambda: _segments(groups, a.host_counts))
    if not most:
        return
    arguments = _Lora(
        y.data_ptr(),
        x.data_ptr(),
        a.pool.data_ptr(),
        b.pool.data_ptr(),
        a.table.data_ptr(),
        b.table.data_ptr(),
        groups.order.data_ptr(),
        segments.data_ptr(),
        None,
        len(segments),
        groups.num_adapted,
        a.width,
        b.width,
        most,
        x.stride(0),
        y.stride(0),
        a.table.stride(0),
        b.table.stride(0),
        native.KINDS[y.dtype],
        torch.get_num_threads(),
    )
    if native.function(SOURCE, "grouped_lora", ctypes.c_void_p)(ctypes.addressof(arguments)):
        raise MemoryError(f"no memory for the inner vectors of {groups.num_adapted} rows")


def _segments(groups: RowGroups, ranks: tuple[int, ...]) -> tuple[Tensor, int]:
    """int32 [segments, 4]: slot, start, stop and rank of those that have one; the largest rank."""
    rows = [(*segment, ranks[segment[0]]) for segment in groups.segments if ranks[segment[0]]]
    return torch.from_numpy(np.asarray(rows, dtype=np.int32)), max((row[3] for row in rows), default=0)
