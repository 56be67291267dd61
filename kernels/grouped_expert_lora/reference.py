"""The meaning of grouped LoRA of experts: one row after the other in fp32."""

from torch import Tensor

from weft.kernels.slot_rows import SlotRows


def grouped_expert_lora(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, slots: list[int], experts: list[int]) -> None:
    """See `weft.kernels.grouped_expert_lora.grouped_expert_lora`; with the slot and expert of each row."""
    for row, (slot, expert) in enumerate(zip(slots, experts, strict=True)):
        if slot >= 0 and a.host_counts[slot]:
            h = (a.of(slot, expert).float() @ x[row].float()).to(x.dtype)
            y[row] = (y[row].float() + h.float() @ b.of(slot, expert).float()).to(y.dtype)
