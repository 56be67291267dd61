"""Grouped LoRA on the CPU: the active slots' weights side by side, so that few rows need two products per site.

Gathering weights from their pools costs as much as the products of a decode step, and the active slots rarely change
between steps: `pack` once, apply many times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

# A segment wastes rows * (sum of ranks - its rank) of foreign columns when it shares a pair of products, and two calls
# when it does not. Beyond this waste, by bytes of an element, calls are cheaper. Measured at in, out in 768..3072 and 2
# to 16 adapters of rank 8 to 64: a 16-bit product (oneDNN, AMX) takes 30 us to start and little to run, an fp32 one
# the reverse.
WORTH_A_PRODUCT = {2: 16000, 4: 600}


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """The low-rank weights of the active slots at one site, one slot's rank rows after the other's.

    Attributes:
        slots: what was packed, slots of rank 0 included.
        layout: (slot, rank) in the order of the rank rows; slots of rank 0 are absent.
        a: [sum of ranks, in].
        b: [sum of ranks, out].
        finite: every value of `b` is known to be finite. Where not, slots must not share a product: 0 * inf is NaN.
    """

    slots: tuple[int, ...]
    layout: tuple[tuple[int, int], ...]
    a: Tensor
    b: Tensor
    finite: bool


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that share one pair of products.

    Attributes:
        rows: of the batch, ascending; a slice where they are adjacent.
        columns: rank rows of the packed weights.
        foreign: bool [rows, columns], rank rows that are not of the row's own slot; None if there are none.
    """

    rows: slice | Tensor
    columns: slice
    foreign: Tensor | None


def pack(a: SlotRows, b: SlotRows, active: Sequence[int]) -> PackedWeights:
    """Gathers the weights of the `active` slots. Pure: the caller keeps the result while neither the active slots nor
    their weights change."""
    gathered_a, gathered_b = a.gather(active), b.gather(active)
    layout = tuple((slot, a.host_counts[slot]) for slot in active if a.host_counts[slot])
    # A sum is finite only if all its values are, and takes a twentieth of the time of looking at each.
    return PackedWeights(tuple(active), layout, gathered_a, gathered_b, bool(gathered_b.sum(0).isfinite().all()))


def grouped_lora_packed(y: Tensor, x: Tensor, packed: PackedWeights, groups: RowGroups) -> None:
    """`grouped_lora` with weights packed for the active slots or more.

    Raises:
        ValueError: a row's slot was not packed.
    """
    key = (packed.slots, packed.layout, packed.finite, packed.a.element_size())
    for block in groups.plan(key, lambda: _blocks(packed, groups)):
        rows, columns = block.rows, block.columns
        h = F.linear(x.index_select(0, rows) if isinstance(rows, Tensor) else x[rows], packed.a[columns])
        if block.foreign is not None:
            # Filled, not multiplied: 0 * inf would carry another slot's overflow into this row.
            h.masked_fill_(block.foreign, 0)
        if isinstance(rows, Tensor):
            y.index_copy_(0, rows, torch.addmm(y.index_select(0, rows), h, packed.b[columns]))
        else:
            y[rows].addmm_(h, packed.b[columns])


def _blocks(packed: PackedWeights, groups: RowGroups) -> tuple[Block, ...]:
    missing = set(groups.active) - set(packed.slots)
    if missing:
        raise ValueError(f"groups holds slots {sorted(missing)}, but the weights were packed for slots {packed.slots}")
    columns = {}
    at = 0
    for slot, rank in packed.layout:
        columns[slot] = slice(at, at + rank)
        at += rank
    bound = WORTH_A_PRODUCT[packed.a.element_size()] if packed.finite else 0
    shared: list[int] = []
    alone: list[int] = []
    for slot, start, stop in groups.segments:
        if slot in columns:
            foreign = at - (columns[slot].stop - columns[slot].start)
            (shared if (stop - start) * foreign <= bound else alone).append(slot)
    if len(shared) == 1:
        shared, alone = [], [*alone, *shared]
    blocks = [Block(_rows(groups, slot), columns[slot], None) for slot in alone]
    if shared:
        rows = _rows(groups, *shared)
        owner = torch.repeat_interleave(
            torch.tensor([slot for slot, _ in packed.layout]), torch.tensor([rank for _, rank in packed.layout])
        )
        blocks.append(Block(rows, slice(0, at), groups.slots[rows, None] != owner))
    return tuple(blocks)


def _rows(groups: RowGroups, *slots: int) -> slice | Tensor:
    rows = groups.rows_of(slots)
    assert rows is not None, "active slots have rows"
    return rows
