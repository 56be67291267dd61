"""Rows of a mixture of experts, one for each pair of a token and an expert, grouped by slot and expert.

Which experts a token has is known on the device alone. On a GPU the groups are therefore built there, from sizes the
host does know: no step waits for the routing. An entry of the tables is `slot * experts + expert`.
"""

import numpy as np
import torch
from torch import Tensor

from weft.kernels.groups import RowGroups, to_device


def expert_groups(tokens: RowGroups, token: Tensor, expert: Tensor, *, experts: int, num_slots: int) -> RowGroups:
    """Groups pairs as `RowGroups` groups rows, with entries in the place of slots.

    Args:
        tokens: groups of the tokens of the batch.
        token: int64 [pairs], the token of each pair; every token is in as many pairs.
        expert: int64 [pairs], its expert.
        experts: how many there are.
        num_slots: slots of the tables; the entry after all of theirs has no rows.

    Returns:
        On the CPU complete groups. On a GPU their `segments` are empty and `active` holds slots, not entries; some
        tiles are empty and name the entry that has no rows. That is all the Triton kernels need.
    """
    if expert.is_cuda:
        return device_groups(tokens, token, expert, experts=experts, num_slots=num_slots)
    slots = tokens.slots[token].long()
    entries = torch.where(slots < 0, -1, slots * experts + expert)
    return RowGroups.build(entries.tolist(), expert.device, block_rows=tokens.block_rows)


def device_groups(tokens: RowGroups, token: Tensor, expert: Tensor, *, experts: int, num_slots: int) -> RowGroups:
    """`expert_groups` without waiting for the device. There must be an active slot."""
    device, rows, block = expert.device, len(token), tokens.block_rows
    active = tokens.plan("active", lambda: to_device(np.asarray(tokens.active, dtype=np.int64), device))
    num_groups = len(tokens.active) * experts
    slots = tokens.slots[token].long()
    # Groups count active slots only: there may be many more that have no rows in this batch.
    group = torch.where(slots < 0, num_groups, torch.searchsorted(active, slots) * experts + expert)
    adapted = tokens.num_adapted * (rows // tokens.num_rows)
    order = group.argsort(stable=True)[:adapted]
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(0, group, torch.ones_like(group))[:-1]
    starts, tiles = counts.cumsum(0) - counts, (counts + block - 1) // block
    ends = tiles.cumsum(0)
    # No distribution of the pairs over the groups needs more tiles than this.
    index = torch.arange(min(adapted, adapted // block + num_groups), device=device)
    of = torch.searchsorted(ends, index, right=True).clamp_(max=num_groups - 1)
    start = starts[of] + (index - ends[of] + tiles[of]) * block
    length = (starts[of] + counts[of] - start).clamp_(max=block)
    entry = active[of // experts] * experts + of % experts
    used = index < ends[-1]
    table = torch.stack(
        [torch.where(used, entry, num_slots * experts), torch.where(used, start, 0), torch.where(used, length, 0)], 1
    )
    return RowGroups(
        slots=torch.where(slots < 0, -1, slots * experts + expert).int(),
        order=order.int(),
        tiles=table.int(),
        segments=(),
        active=tokens.active,
        num_rows=rows,
        block_rows=block,
    )
