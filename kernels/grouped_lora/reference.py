"""The meaning of grouped LoRA: one slot after the other in fp32."""

from torch import Tensor

from weft.kernels.groups import RowGroups

from .pages import RankPages, rank_rows


def grouped_lora(y: Tensor, x: Tensor, weights: RankPages, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_lora.grouped_lora`."""
    for slot, start, stop in groups.segments:
        rank = int(weights.ranks[slot])
        if rank == 0:
            continue
        rows = groups.order[start:stop].long()
        a = rank_rows(weights.a_pool, weights.a_pages[slot], rank)
        b = rank_rows(weights.b_pool, weights.b_pages[slot], rank)
        h = (x[rows].float() @ a.float().T).to(x.dtype)
        y[rows] = (y[rows].float() + h.float() @ b.float()).to(y.dtype)
