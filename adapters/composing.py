"""Composes adapters: which may be weighed against each other, and what every row of the result is a sum of.

``linear`` is Σ w ΔW. Of low-rank updates that is the factors side by side, B's weighed; of dense and sparse updates
and of shifts of the output, which are biases less the base's, the weighed sum. ``lorahub`` is LoRAHub's mixture
(arXiv 2307.13269, its ``get_final_weights``): A = Σ w A, B = Σ w B of the factors as they were trained, under the scale
of the first adapter, whose configuration LoRAHub loads the sum with.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.adapters.composition import Combination, Composition
from weft.adapters.errors import NotComposable
from weft.adapters.forms import CompiledAdapter
from weft.adapters.layout import Layout, Place
from weft.adapters.parts import Part, Sparse

FACTORS = frozenset({Part.A, Part.B})
ADDITIVE = FACTORS | {Part.DELTA, Part.SPARSE, Part.SHIFT}
"""The parts whose sum is what the sum of the updates is made of."""

_NAMES: Mapping[Part, str] = {
    **dict.fromkeys((Part.GAIN_IN, Part.GAIN_OUT), "Gain"),
    **dict.fromkeys((Part.ROWS, Part.WEIGHT, Part.BIAS), "Replace"),
    **dict.fromkeys((Part.KEYS, Part.VALUES_IN, Part.VALUES_OUT), "GatedPrefix"),
    **dict.fromkeys((Part.EXPERT_A, Part.EXPERT_B, Part.PROTOTYPES), "RoutedLowRank"),
    **dict.fromkeys((Part.DOWN, Part.DOWN_BIAS, Part.UP, Part.UP_BIAS), "Bottleneck"),
    **dict.fromkeys((Part.GATE, Part.GATED_A, Part.GATED_B), "GatedLowRank"),
    **dict.fromkeys((Part.PREFIX_GATE, Part.VALUES_JOINT), "JointPrefix"),
    **dict.fromkeys((Part.GATE_DOWN, Part.GATE_DOWN_BIAS, Part.GATE_UP, Part.GATE_UP_BIAS), "SideNetwork"),
    Part.NETWORK: "SideNetwork",
    Part.ROTATE_IN: "Rotation",
    Part.TURN: "Turn",
    Part.FUSION: "Fusion",
    Part.DELTA: "Delta",
    Part.SPARSE: "Sparse",
    Part.SHIFT: "Bias",
}


@dataclass(frozen=True)
class Share:
    """What a member adds to the rows of a composition at one place.

    Attributes:
        member: its place among the members.
        weight: of its rows.
        first: the row they begin at, of those of an expert where the place has experts.
    """

    member: int
    weight: float
    first: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a composition is made of its members.

    Attributes:
        composition: in canonical order.
        layouts: of its members, in that order.
        layout: of the result.
    """

    composition: Composition
    layouts: tuple[Layout, ...]
    layout: Layout

    @property
    def sources(self) -> tuple[str, ...]:
        """The distinct versions whose rows are needed: those of some weight."""
        return tuple(dict.fromkeys(member.version for member in self.composition.members if member.weight))

    @property
    def sparse(self) -> bool:
        """Values of sparse updates must be put in order, which is done in host memory."""
        return any(part is Part.SPARSE for _, part in self.layout.rows)

    @classmethod
    def of(cls, composition: Composition, known: Mapping[str, tuple[CompiledAdapter, Layout]]) -> Recipe:
        """Check a composition.

        Args:
            known: of each version, the adapter without its sites and its layout.

        Raises:
            NotComposable: naming the member that prevents it.
        """
        check_weights(composition)
        members = [known[member.version] for member in composition.members]
        for index, (outline, layout) in enumerate(members):
            _check_member(composition.combination, index, outline, layout)
            if composition.combination == "lorahub":
                _check_factors(index, layout, members[0][1])
        canonical = composition.canonical
        layouts = tuple(known[member.version][1] for member in canonical.members)
        return cls(canonical, layouts, _layout_of(canonical, layouts))

    def shares(self, place: Place, experts: int = 1) -> list[Share]:
        """Whose rows those at a place are made of. Members of weight 0 have no share.

        Args:
            experts: of the place.
        """
        stacked = self.composition.combination == "linear" and place[1] in FACTORS
        shares, first = [], 0
        for index, (member, layout) in enumerate(zip(self.composition.members, self.layouts, strict=True)):
            count = layout.rows.get(place, 0)
            if count and member.weight:
                shares.append(Share(index, self._weight(index, place), first))
                first += count // experts if stacked else 0
        return shares

    def _weight(self, index: int, place: Place) -> float:
        """Of a member's rows; B of LoRAHub is under the first member's scale in place of its own."""
        weight, (path, part) = self.composition.members[index].weight, place
        if self.composition.combination == "linear":
            return 1.0 if part is Part.A else weight
        own, first = self.layouts[index].scales[path], self.layouts[0].scales[path]
        return weight if part is Part.A or own == first else weight * (first / own)

    def rows(
        self, member_of: Callable[[str], CompiledAdapter], experts_of: Callable[[str], int]
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """The rows at every place, from host memory and one member after the other, summed in fp32.

        Args:
            member_of: the compiled adapter of a version.
            experts_of: how many experts there are at a path; 1 where there are none.
        """
        sums: dict[Place, torch.Tensor] = {}
        sparse: dict[Place, list[tuple[float, Sparse]]] = {}
        shares = {place: self.shares(place, experts_of(place[0])) for place in self.layout.rows}
        for index, member in enumerate(self.composition.members):
            sites = member_of(member.version).sites if member.weight else {}
            for path, forms in sites.items():
                for part, rows in forms.parts().items():
                    place = path, part
                    share = next((s for s in shares.get(place, ()) if s.member == index), None)
                    if share is None:
                        continue
                    if part is Part.SPARSE:
                        assert forms.sparse is not None, "rows of a sparse update are a sparse update's"
                        sparse.setdefault(place, []).append((share.weight, forms.sparse))
                        continue
                    if place not in sums:
                        sums[place] = torch.zeros(self.layout.rows[place], rows.shape[1])
                    _add(sums[place], rows, share, experts_of(path))
        yield from sums.items()
        for place, updates in sparse.items():
            yield place, _sparse_rows(updates, self.layout.rows[place])


def check_weights(composition: Composition) -> None:
    """Raises NotComposable, unless there are members and every weight is a finite number of 32 bits."""
    if composition.combination not in ("lorahub", "linear"):
        raise NotComposable(
            f"'combination' must be 'lorahub' or 'linear', got {composition.combination!r}", param="combination"
        )
    if not composition.members:
        raise NotComposable("a composition needs at least one adapter", param="adapters")
    for index, member in enumerate(composition.members):
        weight = member.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not _is_finite(weight):
            raise NotComposable(
                f"the weight of adapters[{index}] must be a finite number of 32 bits, got {weight!r}",
                param=f"adapters[{index}].weight",
                member=index,
            )


def _is_finite(weight: float) -> bool:
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", weight))[0])
    except OverflowError:
        return False


def _refused(index: int, why: str) -> NotComposable:
    return NotComposable(f"adapters[{index}] cannot be composed: {why}", param=f"adapters[{index}]", member=index)


def _check_member(combination: Combination, index: int, outline: CompiledAdapter, layout: Layout) -> None:
    if outline.prompt is not None:
        raise _refused(index, f"it puts a prompt of its own ({type(outline.prompt).__name__}) in front")
    if outline.invocation:
        raise _refused(index, "it is an activated LoRA, which works on a part of the prompt alone")
    needed = next((choice.name for choice in outline.choices if choice.default is None), None)
    if needed is not None:
        raise _refused(index, f"it is nothing without {needed!r} of the request's choice")
    allowed = FACTORS if combination == "lorahub" else ADDITIVE
    other = next((part for _, part in layout.rows if part not in allowed), None)
    if other is not None:
        what = "LoRA's factors alone" if combination == "lorahub" else "an update that can be added"
        raise _refused(index, f"{_NAMES[other]} is among its forms, and {combination!r} demands {what}")


def _check_factors(index: int, layout: Layout, first: Layout) -> None:
    """What LoRAHub demands: factors as they were trained, of the same shapes at the same modules."""
    foreign = next((path for path, _ in layout.rows if path not in layout.scales), None)
    if foreign is not None:
        raise _refused(index, f"'lorahub' mixes LoRA's own factors, and those at {foreign!r} are made of others")
    for place in {**first.rows, **layout.rows} if layout.rows != first.rows else ():
        ours, theirs = layout.rows.get(place, 0), first.rows.get(place, 0)
        if ours != theirs:
            raise _refused(
                index,
                f"'lorahub' demands the same ranks at the same modules, and at {place[0]!r} it has {ours} rows of "
                f"{place[1].upper()} where the first adapter has {theirs}",
            )
    if layout.scales != first.scales:
        zero = next((path for path, scale in layout.scales.items() if not scale and first.scales[path]), None)
        if zero is not None:
            raise _refused(index, f"its scale at {zero!r} is 0, so its factor B is lost")


def _layout_of(composition: Composition, layouts: Sequence[Layout]) -> Layout:
    """How many rows there are at each place; of sparse updates at most, since values of one place are added up."""
    if composition.combination == "lorahub":
        return Layout(layouts[0].rows if any(member.weight for member in composition.members) else {})
    rows: dict[Place, int] = {}
    for member, layout in zip(composition.members, layouts, strict=True):
        for place, count in layout.rows.items() if member.weight else ():
            before = rows.get(place, 0)
            rows[place] = max(before, count) if place[1] in (Part.DELTA, Part.SHIFT) else before + count
    return Layout(rows)


def _add(total: torch.Tensor, rows: torch.Tensor, share: Share, experts: int) -> None:
    """Add a share's ``rows`` to those of ``total`` that are its own; both ``[experts * count, width]``."""
    width = rows.shape[1]
    own = rows.view(experts, -1, width)
    part = total.view(experts, -1, width)[:, share.first : share.first + own.shape[1]]
    part.add_(own.float() * torch.tensor(share.weight, dtype=torch.float32))


def _sparse_rows(updates: Sequence[tuple[float, Sparse]], count: int) -> torch.Tensor:
    """The weighed sum of sparse updates as ``count`` rows."""
    first = updates[0][1]
    outputs = len(first.starts) - 1
    places, values = [], []
    for weight, update in updates:
        output = torch.arange(outputs).repeat_interleave(update.starts.diff().long())
        places.append(output * first.width + update.columns.long())
        values.append(update.values.float() * torch.tensor(weight, dtype=torch.float32))
    found, where = torch.cat(places).unique(sorted=True, return_inverse=True)
    summed = torch.zeros(len(found)).index_add_(0, where, torch.cat(values)).to(first.values.dtype)
    starts = torch.searchsorted(found, torch.arange(outputs + 1) * first.width).int()
    merged = Sparse(starts, (found % first.width).int(), summed, first.width)
    rows = merged.parts()[Part.SPARSE]
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def as_adapter(composition: Composition) -> CompiledAdapter:
    """What there is to know of a composition beside its rows."""
    return CompiledAdapter(composition.identity, composition.combination, {})
