"""The meaning of grouped LoRA: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def grouped_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`."""
    for slot, start, stop in groups.segments:
        if not a.host_counts[slot]:
            continue
        rows = groups.order[start:stop].long()
        h = (x[rows].float() @ a.of(slot).float().T).to(x.dtype)
        y[rows] = (y[rows].float() + h.float() @ b.of(slot).float()).to(y.dtype)
