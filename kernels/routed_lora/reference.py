"""The meaning of routed LoRA: one slot after the other in fp32. It is the CPU path as well."""

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def routed_lora(
    y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, prototypes: SlotRows, top_k: Tensor, groups: RowGroups
) -> None:
    """See `weft.kernels.routed_lora.routed_lora`."""
    for slot, start, stop in groups.segments:
        experts = prototypes.host_counts[slot]
        if not experts:
            continue
        rows = groups.order[start:stop].long()
        inputs = x[rows].float()
        likeness = (inputs @ prototypes.of(slot).float().T).abs()
        kept, which = likeness.topk(int(top_k[slot]), dim=1)
        weights = torch.zeros_like(likeness).scatter_(1, which, kept.softmax(1))
        h = (inputs @ a.of(slot).float().T).unflatten(1, (experts, -1)) * weights.unsqueeze(2)
        update = h.flatten(1).to(x.dtype).float() @ b.of(slot).float()
        y[rows] = (y[rows].float() + update).to(y.dtype)
