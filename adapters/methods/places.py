"""What the loaders share whose methods train few values of a weight or of its spectrum: how many, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.config_fields import ConfigFields, FieldTable, as_integer, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods.factors import FAN_FIELD, PRODUCT_FIELDS
from weft.adapters.methods.targets import PATTERN_KEY, match_patterns
from weft.adapters.parts import Sparse
from weft.kernels.sparse_rows import row_counts

LINEAR_FIELDS = PRODUCT_FIELDS | FieldTable(honoured=("target_modules",))

TRANSPOSED_FIELDS = LINEAR_FIELDS | FAN_FIELD
"""Of methods that adapt Conv1D too."""

SEEDS = {"low": -(1 << 63), "high": (1 << 64) - 1}
"""What a torch generator takes."""


def count_of_sites(
    config: ConfigFields, name: str, default: int, sites: Sequence[Site], *, key_format: str = PATTERN_KEY
) -> dict[str, int]:
    """By path, ``config[name]`` or what ``<name>_pattern`` has for the site: an integer, at most a weight's values."""
    pattern = f"{name}_pattern"
    patterns = config.mapping(pattern)
    own = {site.path: patterns[site.path] for site in sites if site.path in patterns}
    own |= match_patterns(patterns, sites, pattern, key_format=key_format)
    usual = config.integer(name, default, low=1, high=1 << 48)
    counts = {}
    for site in sites:
        given, param = (own[site.path], pattern) if site.path in own else (usual, name)
        counts[site.path] = as_integer(param, given, low=1, high=site.in_features * site.out_features)
    return counts


class RandomPlaces:
    """Which values of a weight peft draws: the first of a seeded random order, the same at sites of one size."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, site: Site, count: int) -> torch.Tensor:
        """``[count]`` places in the flat ``[out, in]`` weight."""
        size = site.in_features * site.out_features
        if (size, count) not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed)
            # A copy, or it would keep the whole order.
            self._drawn[size, count] = torch.randperm(size, generator=generator)[:count].clone()
        return self._drawn[size, count]


def sparse_update(base: Base, site: Site, places: torch.Tensor, values: torch.Tensor, name: str) -> SiteForms:
    """``W += S``, S zero but for ``values`` at flat ``places``; where a place occurs twice, their sum.

    Sparse where that takes less memory than a dense update, which needs an input of even width.

    Args:
        name: of the tensor that holds the places, for errors.

    Raises:
        AdapterFormatError: a place is outside the weight.
    """
    check_places(site, places, name)
    taken, index = places.unique(return_inverse=True)
    packed = sum(row_counts(site.out_features, len(taken), site.in_features, base.dtype.itemsize))
    if site.in_features % 2 or packed >= site.out_features:
        return SiteForms(delta=scattered(site, places, values, name))
    starts = torch.searchsorted(taken, torch.arange(site.out_features + 1) * site.in_features)
    summed = torch.zeros(len(taken)).index_add_(0, index, values)
    return SiteForms(sparse=Sparse(starts.int(), (taken % site.in_features).int(), summed, site.in_features))


def check_places(site: Site, places: torch.Tensor, name: str) -> None:
    """Raise AdapterFormatError where a place is outside the weight."""
    size = site.in_features * site.out_features
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise AdapterFormatError(f"{show(name)} points outside the weight of {size} values", param=name[:200])


def scattered(site: Site, places: torch.Tensor, values: torch.Tensor, name: str) -> torch.Tensor:
    """``[out, in]``, zero but for ``values`` at flat ``places``; where a place occurs twice, their sum.

    Args:
        name: of the tensor that holds the places, for errors.

    Raises:
        AdapterFormatError: a place is outside the weight.
    """
    check_places(site, places, name)
    size = site.in_features * site.out_features
    return torch.zeros(size).index_add_(0, places, values).view(site.out_features, site.in_features)
