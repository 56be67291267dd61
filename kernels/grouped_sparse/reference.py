"""The meaning of the grouped sparse: one slot after the other in fp32."""

import torch
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.sparse_rows import unpack_rows


def grouped_sparse(y: Tensor, x: Tensor, sparse: SlotRows, groups: RowGroups) -> None:
    """See `weft.kernels.grouped_sparse.grouped_sparse`."""
    for slot, start, stop in groups.segments:
        if sparse.host_counts[slot]:
            starts, columns, values = unpack_rows(sparse.of(slot), y.shape[1])
            update = torch.zeros(y.shape[1], x.shape[1], device=y.device)
            outputs = torch.arange(y.shape[1], device=y.device).repeat_interleave(starts.diff())
            update.index_put_((outputs, columns.long()), values.float(), accumulate=True)
            rows = groups.order[start:stop].long()
            y[rows] = (y[rows].float() + x[rows].float() @ update.T).to(y.dtype)
