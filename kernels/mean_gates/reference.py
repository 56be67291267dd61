"""The meaning of mean gates: one slot after the other in fp32. It is the CPU path as well."""

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.spans import Spans

SOFTMAX = 2


def mean_gates(x: Tensor, gates: SlotRows, links: Tensor, spans: Spans, groups: RowGroups) -> Tensor:
    """See `weft.kernels.mean_gates.mean_gates`."""
    result = torch.ones(len(x), gates.max_count - 1, device=x.device)
    sizes = spans.bounds.diff().unsqueeze(1)
    for slot, start, stop in groups.segments:
        count = gates.host_counts[slot] - 1
        if count < 1:
            continue
        rows = groups.order[start:stop].long()
        own = gates.of(slot).float()
        scores = x[rows].float() @ own[:count].T + own[count, :count]
        values = scores.softmax(1) if int(links[slot]) == SOFTMAX else scores.sigmoid()
        ids = spans.ids[rows]
        sums = values.new_zeros(spans.count, count).index_add_(0, ids, values)
        result[rows, :count] = (sums / sizes)[ids]
    return result
