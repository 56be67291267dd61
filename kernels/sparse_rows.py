"""A sparse update as rows of a pool: where each output's values begin, their columns, and the values.

The three follow each other, each from the start of a row on. The integers are int32 and lie in the rows bit for bit,
whatever the element type, so that a sparse update is allocated, counted and freed as everything else an adapter has:
a pool of its own would take memory from those who have none.
"""

import torch
from torch import Tensor


def row_counts(outputs: int, count: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of `width` elements that the beginnings, the columns and `count` values take."""
    integers = width * itemsize // 4
    return -(-(outputs + 1) // integers), -(-count // integers), -(-count // width)


def pack_rows(starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """The rows, [count, width] of the dtype of `values`; width times its size is a multiple of 4.

    Args:
        starts: int32 [outputs + 1]; output n has the values from `starts[n]` up to `starts[n + 1]`.
        columns: int32 [n], below `width`.
        values: [n].
    """
    counts = row_counts(len(starts) - 1, len(values), width, values.element_size())
    rows = values.new_zeros(sum(counts), width)
    for part, tensor in zip(rows.split(counts), (starts, columns, values), strict=True):
        part.view(tensor.dtype).view(-1)[: len(tensor)] = tensor
    return rows


def unpack_rows(rows: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack_rows` was given, as views; rows beyond that count nothing. Waits for the device."""
    starts = rows.view(torch.int32).view(-1)[: outputs + 1]
    count = int(starts[-1])
    counts = row_counts(outputs, count, rows.shape[1], rows.element_size())
    _, columns, values = rows[: sum(counts)].split(counts)
    return starts, columns.view(torch.int32).view(-1)[:count], values.reshape(-1)[:count]
