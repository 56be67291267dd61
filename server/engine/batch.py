"""Turns the scheduler's rows into the tensors of one flat batch, on the host, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weft.kernels.groups import RowGroups, to_device
from weft.kernels.paged_attention import AttentionRows
from weft.server.engine.scheduler import Row


@dataclass(frozen=True)
class Wanted:
    """Positions of one row whose logits are wanted: tokens ``[start, stop)`` of its sequence, as rows of the logits.

    Attributes:
        first: index of the first of them among all rows of the logits.
    """

    row: Row
    start: int
    stop: int
    first: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """One forward pass: T tokens of all rows in one sequence dimension, N of which get logits.

    Attributes:
        input_ids, position_ids: int64 ``[1, T]``.
        logit_indices: int64 ``[N]``, tokens of the flat batch.
        wanted: what the N rows of logits are.
        attention: where keys and values lie.
        tokens, logits: adapter groups of the T tokens and of the N rows.
        num_adapters: distinct adapters in the batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_indices: torch.Tensor
    wanted: list[Wanted]
    attention: AttentionRows
    tokens: RowGroups
    logits: RowGroups
    num_adapters: int

    @classmethod
    def build(cls, rows: list[Row], block_size: int, device: torch.device) -> Batch:
        """Lay ``rows`` out one after the other: decoding ones first, those of one adapter together.

        Neighbours of one slot let the CPU path take slices of the batch where it would gather rows.
        """
        rows = sorted(rows, key=lambda row: (row.stop - row.start > 1, row.seq.slot))
        lens = [row.stop - row.start for row in rows]
        attention = AttentionRows.build(
            lens, [row.stop for row in rows], [row.seq.blocks for row in rows], block_size, device
        )
        ids = np.fromiter(
            (token for row in rows for token in row.seq.tokens[row.start : row.stop]), np.int64, count=sum(lens)
        )
        wanted, indices = _wanted(rows)
        slots = np.repeat([row.seq.slot for row in rows], lens)
        logit_slots = [want.row.seq.slot for want in wanted for _ in range(want.count)]
        tokens = RowGroups.build(slots.tolist(), device)
        return cls(
            input_ids=to_device(ids, device).unsqueeze(0),
            position_ids=attention.positions.unsqueeze(0),
            logit_indices=to_device(indices, device),
            wanted=wanted,
            attention=attention,
            tokens=tokens,
            logits=RowGroups.build(logit_slots, device),
            num_adapters=len(tokens.active),
        )


def _wanted(rows: list[Row]) -> tuple[list[Wanted], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The last position of every row that samples, and all prompt positions where their logprobs are asked for."""
    wanted: list[Wanted] = []
    indices: list[int] = []
    base = 0
    for row in rows:
        stop = row.stop
        start = stop - 1 if row.samples else stop
        if row.seq.prompt_logprobs is not None and row.start < row.seq.prompt_len - 1:
            # The logits at a position speak of the next token; those of the last prompt token are sampled from.
            start = row.start
        if start < stop:
            wanted.append(Wanted(row, start, stop, len(indices)))
            indices.extend(range(base + start - row.start, base + stop - row.start))
        base += stop - row.start
    return wanted, np.asarray(indices, dtype=np.int64)
