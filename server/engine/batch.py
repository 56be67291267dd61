"""Turns the scheduler's rows into the tensors of one flat batch, on the host, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weft.kernels.groups import RowGroups, to_device
from weft.kernels.paged_attention import AttentionRows
from weft.kernels.spans import Spans
from weft.server.engine.pending import to_ids
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
        slots: of every row, as ``attention`` counts them; -1: the base.
        num_adapters: distinct adapters in the batch.
        copies: pages (from, to) to copy before the pass: tails of adapters' prompts.
        embeddings: flat tokens, and what stands for them in place of their ids: int64 ``[V]``, ``[V, hidden]``.
        spans: what gates are means over; None where no row has gates.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_indices: torch.Tensor
    wanted: list[Wanted]
    attention: AttentionRows
    tokens: RowGroups
    logits: RowGroups
    slots: tuple[int, ...]
    num_adapters: int
    copies: list[tuple[int, int]]
    embeddings: tuple[torch.Tensor, torch.Tensor] | None
    spans: Spans | None

    @classmethod
    def build(
        cls, rows: list[Row], block_size: int, device: torch.device, sampled: torch.Tensor | None = None
    ) -> Batch:
        """Lay ``rows`` out one after the other: decoding ones first, those of one adapter together.

        Neighbours of one slot let the CPU path take slices of the batch where it would gather rows.

        Args:
            sampled: the tokens of the step under way, as in ``to_ids``.
        """
        rows = sorted(rows, key=lambda row: (row.stop - row.start > 1, row.seq.slot))
        lens = [row.stop - row.start for row in rows]
        context = [row.seq.offset + row.stop for row in rows]
        attention = AttentionRows.build(lens, context, [row.seq.blocks for row in rows], block_size, device)
        ids = [token for row in rows for token in row.seq.tokens[row.start : row.stop]]
        wanted, indices = _wanted(rows)
        slots = [slot for row in rows for slot in row.seq.slots(row.start, row.stop)]
        logit_slots = [slot for want in wanted for slot in want.row.seq.slots(want.start, want.stop)]
        tokens = RowGroups.build(slots, device)
        return cls(
            input_ids=to_ids(ids, sampled, device).unsqueeze(0),
            position_ids=_position_ids(rows, lens, attention, device).unsqueeze(0),
            logit_indices=to_device(indices, device),
            wanted=wanted,
            attention=attention,
            tokens=tokens,
            logits=RowGroups.build(logit_slots, device),
            slots=tuple(row.seq.slot for row in rows),
            num_adapters=len(tokens.active),
            copies=[row.seq.copy for row in rows if row.seq.copy is not None],
            embeddings=_embeddings(rows, lens, device),
            spans=_spans(rows, device),
        )


def _position_ids(rows: list[Row], lens: list[int], attention: AttentionRows, device: torch.device) -> torch.Tensor:
    """int64 ``[T]``: places in the pages, but for adapters whose own prompt counts otherwise."""
    shifts = [row.seq.prompt.position_offset - row.seq.prompt.length if row.seq.prompt else 0 for row in rows]
    if not any(shifts):
        return attention.positions
    return attention.positions + to_device(np.repeat(shifts, lens), device)


def _embeddings(rows: list[Row], lens: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The virtual tokens of the batch."""
    starts = np.cumsum([0, *lens])
    places, vectors = [], []
    for row, start, count in zip(rows, starts, lens, strict=False):
        if row.seq.embeddings is not None:
            places.append(np.arange(start, start + count))
            vectors.append(row.seq.embeddings[row.start : row.stop])
    if not places:
        return None
    return to_device(np.concatenate(places), device), torch.cat(vectors).to(device, non_blocking=True)


def _spans(rows: list[Row], device: torch.device) -> Spans | None:
    """A row without gates is one span, whatever it is."""
    gated = [index for index, row in enumerate(rows) if row.seq.whole_prompt]
    if not gated:
        return None
    lengths = [
        length
        for row in rows
        for length in (row.seq.spans(row.start, row.stop) if row.seq.whole_prompt else (row.stop - row.start,))
    ]
    return Spans.build(lengths, gated, device)


def _wanted(rows: list[Row]) -> tuple[list[Wanted], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The last position of every row that samples, and all prompt positions where their logprobs are asked for."""
    wanted: list[Wanted] = []
    indices: list[int] = []
    base = 0
    for row in rows:
        stop = row.stop
        start = stop - 1 if row.samples else stop
        if row.seq.scored and row.start < row.seq.prompt_len - 1:
            # The logits at a position speak of the next token; those of the last prompt token are sampled from.
            start = row.start
        if start < stop:
            wanted.append(Wanted(row, start, stop, len(indices)))
            indices.extend(range(base + start - row.start, base + stop - row.start))
        base += stop - row.start
    return wanted, np.asarray(indices, dtype=np.int64)
