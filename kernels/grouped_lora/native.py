"""Grouped LoRA by kernels in C that read the weights where they lie in their pools: few rows of a slot, or many."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels import native
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

ROWS, TILES = "grouped_lora/rows.c", "grouped_lora/tiles.c"
# Rows of one slot from which tiles are quicker than vectors.
TILE_ROWS = 16
# And beyond which, where there are no tiles, torch's products of matrices are.
FEW_ROWS = 64

_POINTER, _INT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t


class _Lora(ctypes.Structure):
    """`Lora` of lora.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("y", "x", "a", "b", "table_a", "table_b", "order", "segments")),
        *((name, _INT) for name in ("segments_count", "rows", "inputs", "outputs", "most_rank")),
        *((name, _STRIDE) for name in ("stride_x", "stride_y", "stride_table_a", "stride_table_b")),
        *((name, _INT) for name in ("kind", "threads")),
    )


def supported(y: Tensor, x: Tensor, groups: RowGroups) -> bool:
    """Whether the kernels serve these tensors here, and are the quicker way."""
    if y.dtype not in native.KINDS or not y.stride(1) == x.stride(1) == 1 or not native.available(ROWS):
        return False
    most = groups.plan("most rows", lambda: max(stop - start for _, start, stop in groups.segments))
    return most <= FEW_ROWS or _tiles(y.dtype)


def grouped_lora_native(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`.

    Raises:
        MemoryError: there is none for what lies between x and y.
    """
    for call in _calls(y.dtype, a, groups):
        arguments = _arguments(call, y, x, a, b, groups)
        if native.function(call.source, call.name, ctypes.c_void_p)(ctypes.addressof(arguments)):
            raise MemoryError(f"no memory for the inner vectors of {groups.num_adapted} rows")


def in_passing(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> ctypes.Structure | None:
    """The same as an argument of a kernel that includes `rows.h`; None where that is not the way for these rows."""
    if not supported(y, x, groups):
        return None
    calls = _calls(y.dtype, a, groups)
    if len(calls) != 1 or calls[0].source != ROWS:
        return None
    return _arguments(calls[0], y, x, a, b, groups)


def _tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and native.has_tiles(TILES)


@dataclass(frozen=True, eq=False)
class _Call:
    """Slots that one kernel does. segments: int32 [slots, 4], slot, start and stop in `order`, and rank."""

    source: str
    name: str
    segments: Tensor
    most_rank: int


def _arguments(call: _Call, y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> _Lora:
    return _Lora(
        y.data_ptr(),
        x.data_ptr(),
        a.pool.data_ptr(),
        b.pool.data_ptr(),
        a.table.data_ptr(),
        b.table.data_ptr(),
        groups.order.data_ptr(),
        call.segments.data_ptr(),
        len(call.segments),
        groups.num_adapted,
        a.width,
        b.width,
        call.most_rank,
        x.stride(0),
        y.stride(0),
        a.table.stride(0),
        b.table.stride(0),
        native.KINDS[y.dtype],
        torch.get_num_threads(),
    )


def _calls(dtype: torch.dtype, a: SlotRows, groups: RowGroups) -> list[_Call]:
    """What serves these rows, the same for all sites whose adapters have the same ranks."""
    tiles = _tiles(dtype)
    return groups.plan(("ranked", a.host_counts, tiles), lambda: _plan(groups, a.host_counts, tiles))


def _plan(groups: RowGroups, ranks: Sequence[int], tiles: bool) -> list[_Call]:
    """Slots of few rows by vectors, those of many by tiles where there are any; none for slots without a rank."""
    ranked = [(*segment, ranks[segment[0]]) for segment in groups.segments if ranks[segment[0]]]
    many = [segment for segment in ranked if tiles and segment[2] - segment[1] >= TILE_ROWS]
    few = [segment for segment in ranked if segment not in many]
    return [
        _Call(source, name, torch.tensor(chosen, dtype=torch.int32), max(segment[3] for segment in chosen))
        for source, name, chosen in ((ROWS, "lora_of_rows", few), (TILES, "lora_of_tiles", many))
        if chosen
    ]
