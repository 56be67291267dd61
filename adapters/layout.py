"""What an adapter takes of the device's memory, known without its tensors, and how that memory is divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from weft.adapters.base import Base
from weft.adapters.bottlenecks import FusionShape
from weft.adapters.forms import CompiledAdapter
from weft.adapters.parts import Part
from weft.adapters.side import SideShape
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Input

Place = tuple[str, Part]
"""A site's path and a part of an adapter there."""

Kind = tuple[Input, Activation]
"""What a bottleneck is beside its rows."""


@dataclass(frozen=True)
class Layout:
    """What an adapter needs, known without its tensors.

    Attributes:
        rows: how many rows it has at each place; places without any are absent.
        ids: the tokens of ``Part.ROWS`` by path.
        numbers: what goes with a part and is no row; see ``SiteForms.numbers``.
        kinds: input and activation of bottlenecks by path.
        fusions: likewise, of fusions.
        networks: likewise, of side networks.
        scales: of low-rank updates that are LoRA's own factors, by path; see ``LowRank.scale``.
    """

    rows: Mapping[Place, int]
    ids: Mapping[str, torch.Tensor] = field(default_factory=dict)
    numbers: Mapping[Place, int] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    fusions: Mapping[str, FusionShape] = field(default_factory=dict)
    networks: Mapping[str, SideShape] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: CompiledAdapter) -> Layout:
        counts = {
            (path, part): len(rows)
            for path, forms in adapter.sites.items()
            for part, rows in forms.parts().items()
            if len(rows)
        }
        sites = adapter.sites.items()
        return cls(
            counts,
            {path: forms.rows.ids for path, forms in sites if forms.rows},
            {(path, part): number for path, forms in sites for part, number in forms.numbers().items()},
            {path: (forms.bottleneck.input, forms.bottleneck.activation) for path, forms in sites if forms.bottleneck},
            {path: forms.fusion.shape for path, forms in sites if forms.fusion},
            {path: forms.network.shape for path, forms in sites if forms.network},
            {p: f.low_rank.scale for p, f in sites if f.low_rank is not None and f.low_rank.scale is not None},
        )


@dataclass(frozen=True)
class Placement:
    """Where an adapter goes: its slot, and its rows in the pools by place. Nobody else writes there."""

    slot: int
    layout: Layout
    rows: Mapping[Place, list[int]]


def capacity_of(base: Base, memory: int, dtype: torch.dtype) -> dict[int, int]:
    """Rows by width: of every share of the memory as many as equal ranks at all its sites take.

    Raises:
        ValueError: a share does not hold one rank for every site.
    """
    plain = [*base.sites.values(), *([base.embedding] if base.embedding else [])]
    plain += [site for site in base.parameter_sites.values() if not site.experts]
    experts = [site for site in base.parameter_sites.values() if site.experts]
    shares = [sites for sites in (plain, experts) if sites]
    capacity = Counter[int]()
    for sites in shares:
        widths = Counter[int]()
        for site in sites:
            for width in (site.in_features, site.out_features):
                widths[width] += max(1, site.experts)
        if sites is plain:
            # Norms within attention are of widths that no linear layer may have; a row for each of their parameters.
            widths.update(Counter(width for width in _norm_widths(base) if width not in widths))
        per_rank = sum(width * count for width, count in widths.items()) * dtype.itemsize
        ranks = memory // len(shares) // per_rank
        if ranks < 1:
            least = per_rank * len(shares)
            raise ValueError(f"adapter memory of {memory} bytes is below the least useful, {least} (rank 1)")
        capacity.update({width: ranks * count for width, count in widths.items()})
    return dict(capacity)


def _norm_widths(base: Base) -> Iterable[int]:
    return (norm.out_features for norm in base.norms.values() for _ in range(1 + norm.has_bias))
