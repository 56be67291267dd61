"""The weighting step: fills the rows of a composition from those of its members, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from weft.adapters.composing import FACTORS, Recipe, Share
from weft.adapters.layout import Place, Placement
from weft.adapters.slots import SlotPool
from weft.kernels.weighted_sum import weighted_sum


@dataclass
class _Sums:
    """Rows of one pool to be written, and the terms of each, one list for the first terms of all rows and so on."""

    pool: torch.Tensor
    where: list[int] = field(default_factory=list)
    index: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    def launch(self) -> None:
        where = torch.tensor(self.where, dtype=torch.int32)
        index = torch.tensor(self.index, dtype=torch.int32).T.contiguous()
        weights = torch.tensor(self.weights, dtype=torch.float32).T.contiguous()
        where, index, weights = (tensor.to(self.pool.device, non_blocking=True) for tensor in (where, index, weights))
        weighted_sum(self.pool, where, self.pool, index, weights)


def weigh(pool: SlotPool, placement: Placement, recipe: Recipe, members: Sequence[Placement | None]) -> None:
    """Fill the rows of ``placement``; returns when they are there. Any thread.

    Two launches a width at most: one for what is a sum, one for what is copied side by side.

    Args:
        members: where those of the recipe are, which must stay until this returns; None where the weight is 0.
    """
    sums: dict[tuple[int, bool], _Sums] = {}
    for place, rows in placement.rows.items():
        experts = pool.experts(place[0])
        shares = recipe.shares(place, experts)
        stacked = recipe.composition.combination == "linear" and place[1] in FACTORS
        storage = pool.storage(place)
        mine = sums.setdefault((storage.shape[1], stacked), _Sums(storage))
        mine.where += rows
        if stacked:
            _stack(mine, place, shares, members, experts)
        else:
            _sum(mine, place, {share.member: share.weight for share in shares}, members, len(rows))
    with pool.writing():
        for mine in sums.values():
            mine.launch()


def _stack(
    sums: _Sums, place: Place, shares: Sequence[Share], members: Sequence[Placement | None], experts: int
) -> None:
    """Of every expert, the rows of one member after those of the other."""
    if not sums.index:
        sums.index, sums.weights = [[]], [[]]
    for expert in range(experts):
        for share in shares:
            rows = _rows(members[share.member], place)
            count = len(rows) // experts
            sums.index[0] += rows[expert * count : (expert + 1) * count]
            sums.weights[0] += [share.weight] * count


def _sum(sums: _Sums, place: Place, weights: dict[int, float], members: Sequence[Placement | None], count: int) -> None:
    """A term for every member, nothing for those that have no share."""
    if not sums.index:
        sums.index, sums.weights = [[] for _ in members], [[] for _ in members]
    for member, placement in enumerate(members):
        shared = member in weights
        sums.index[member] += _rows(placement, place) if shared else [-1] * count
        sums.weights[member] += [weights.get(member, 0.0)] * count


def _rows(placement: Placement | None, place: Place) -> list[int]:
    assert placement is not None, "a member that counts is on the device"
    return placement.rows[place]
