"""The meaning of the gated prefix: one slot after the other in fp32. It is the CPU path as well: prefixes are short."""

from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows


def gated_prefix(y: Tensor, q: Tensor, keys: SlotRows, values: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.gated_prefix.gated_prefix`."""
    width = q.shape[2]
    for slot, start, stop in groups.segments:
        if not values.host_counts[slot]:
            continue
        rows = groups.order[start:stop].long()
        k, v = (prefix.of(slot).float().unflatten(1, (-1, width)) for prefix in (keys, values))
        queries = q[rows].float().unflatten(1, (k.shape[1], -1))  # [t, kv_heads, group, d]
        weights = (queries.transpose(0, 1).flatten(1, 2) @ k.permute(1, 2, 0)).softmax(-1)
        found = (weights @ v.transpose(0, 1)).unflatten(1, (len(rows), -1)).transpose(0, 1)
        y[rows] = (y[rows].float() + found.flatten(1)).to(y.dtype)
