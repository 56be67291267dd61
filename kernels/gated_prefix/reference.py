"""The meaning of the gated prefix: one slot after the other in fp32. It is the CPU path as well: prefixes are short."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

if TYPE_CHECKING:
    from . import Joint


def gated_prefix(
    y: Tensor, q: Tensor, keys: SlotRows, values: SlotRows, groups: RowGroups, joint: "Joint | None" = None
) -> None:
    """See `weft.kernels.gated_prefix.gated_prefix`."""
    width = q.shape[2]
    for slot, start, stop in groups.segments:
        if not values.host_counts[slot]:
            continue
        rows = groups.order[start:stop].long()
        k, v = (prefix.of(slot).float().unflatten(1, (-1, width)) for prefix in (keys, values))
        queries = q[rows].float().unflatten(1, (k.shape[1], -1))  # [t, kv_heads, group, d]
        scores = torch.einsum("tgid,ngd->tgin", queries, k)
        own = y[rows].float().view_as(queries)
        if joint is None:
            found = own + torch.einsum("tgin,ngd->tgid", scores.softmax(-1), v)
        else:
            gate, lse = joint.gates[rows, :, None, None, None], joint.lse[rows].view(*queries.shape[:3], 1)
            weights = torch.cat([scores * joint.scale * gate[:, 0], lse], -1).softmax(-1)
            found = torch.einsum("tgin,ngd->tgid", weights[..., :-1] * gate[:, 1], v) + weights[..., -1:] * own
        y[rows] = found.flatten(1).to(y.dtype)
