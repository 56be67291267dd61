"""The meaning of grouped LoRA: one slot after the other in fp32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`."""
    expand(y, shrink(x, a, groups), b, groups)


def shrink(
    x: Tensor, a: SlotRows, groups: RowGroups, launch_in: AbstractContextManager[object] | None = None
) -> Tensor:
    """See `weft.kernels.grouped_lora.shrink`."""
    planes = torch.empty(1, groups.num_adapted, a.padded_count, dtype=torch.float32, device=x.device)
    with launch_in or nullcontext():
        for slot, start, stop in groups.segments:
            h = x[groups.order[start:stop].long()].float() @ a.of(slot).float().T
            planes[0, start:stop, : a.host_counts[slot]] = h
    return planes


def expand(y: Tensor, planes: Tensor, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.expand`."""
    for slot, start, stop in groups.segments:
        rank = b.host_counts[slot]
        if not rank:
            continue
        rows = groups.order[start:stop].long()
        h = planes[:, start:stop, :rank].sum(0).to(y.dtype)
        y[rows] = (y[rows].float() + h.float() @ b.of(slot).float()).to(y.dtype)
