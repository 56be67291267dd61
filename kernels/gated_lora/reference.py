"""The meaning of gated LoRA: one slot after the other in fp32. It is the CPU path as well."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def gated_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, gate: SlotRows, gates: Tensor, groups: RowGroups
) -> None:
    """See `weft.kernels.gated_lora.gated_lora`."""
    for slot, start, stop in groups.segments:
        if not b.host_counts[slot]:
            continue
        count = gate.host_counts[slot] - 1
        each = b.host_counts[slot] // count
        rows = groups.order[start:stop].long()
        h = (x[rows].float() @ a.of(slot).float().T).unflatten(1, (-1, each))  # one for each gate, or one for all
        weighed = (h * gates[rows, :count].unsqueeze(2)).flatten(1).to(x.dtype).float()
        y[rows] = (y[rows].float() + weighed @ b.of(slot).float()).to(y.dtype)
