"""WaveFT (arXiv 2505.12532): ΔW = scaling · IDWT2(C), or scaling · C; C is zero but for trained values at random
places.

C is padded by what one step of synthesis takes away and cut into the four bands of one level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, as_integer, show
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import check_dense, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.places import (
    SEEDS,
    TRANSPOSED_FIELDS,
    RandomPlaces,
    count_of_sites,
    scattered,
    sparse_update,
)
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.methods.wavelets import FAMILIES, synthesis_filters

FIELDS = TRANSPOSED_FIELDS | FieldTable(
    honoured=(
        "n_frequency",
        "n_frequency_pattern",
        "proportional_parameters",
        "scaling",
        "random_loc_seed",
        "wavelet_family",
        "use_idwt",
        "bias",
        *TARGET_FIELDS,
    ),
)
"""Every field of peft 0.21.2's WaveFTConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.SPECTRAL)
    counts = _counts(config, sites)
    scaling = config.number("scaling", 25.0)
    places = RandomPlaces(config.integer("random_loc_seed", 777, **SEEDS))
    filters = _filters(config)
    if filters is not None:
        check_dense(base, sites)
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        count = counts[site.path]
        spectrum = site_tensor(checkpoint, site, "waveft_spectrum", (count,)) * scaling
        drawn = places.of(site, count)
        if filters is None:
            forms[site.path] = sparse_update(base, site, drawn, spectrum, "waveft_spectrum")
        else:
            values = scattered(site, drawn, spectrum, "waveft_spectrum")
            forms[site.path] = SiteForms(delta=_synthesis(values, filters))
    return with_biases(forms, biases, base)


def _counts(config: ConfigFields, sites: Sequence[Site]) -> dict[str, int]:
    if not config.flag("proportional_parameters"):
        return count_of_sites(config, "n_frequency", 2592, sites)
    # One budget, n_frequency for each site, divided by the weights' sizes; nothing is left to the pattern.
    config.mapping("n_frequency_pattern")
    budget = config.integer("n_frequency", 2592, low=1, high=1 << 48) * len(sites)
    sizes = {site.path: site.in_features * site.out_features for site in sites}
    total = sum(sizes.values())
    shares = {path: max(1, round(size / total * budget)) for path, size in sizes.items()}
    return {path: as_integer("n_frequency", share, low=1, high=sizes[path]) for path, share in shares.items()}


def _filters(config: ConfigFields) -> torch.Tensor | None:
    """The low-pass and high-pass filter ``[2, length]``; None without a transform."""
    family = config.text("wavelet_family") or "db1"
    if not config.flag("use_idwt", True):
        return None
    if family not in FAMILIES:
        raise AdapterUnsupported(
            f"wavelet_family={show(family)} is not served; these are: {', '.join(FAMILIES)}", param="wavelet_family"
        )
    return synthesis_filters(family).float()


def _synthesis(values: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """One level of the inverse 2D wavelet transform of ``values`` in the middle of padding; as large as they are."""
    rows, columns = values.shape
    lost = filters.shape[1] - 2
    height, width = (size + lost + (size + lost) % 2 for size in (rows, columns))
    top, left = (height - rows) // 2, (width - columns) // 2
    padded = F.pad(values, (left, width - columns - left, top, height - rows - top))
    upper, lower = padded.split(height // 2)
    (low_low, high_low), (low_high, high_high) = (half.split(width // 2, dim=1) for half in (upper, lower))
    # The band at the top right is high-pass along the rows' direction, as in peft: not what its place suggests.
    low = _merged(low_low.T, high_low.T, filters).T
    high = _merged(low_high.T, high_high.T, filters).T
    made = _merged(low, high, filters)
    top, left = (made.shape[0] - rows) // 2, (made.shape[1] - columns) // 2
    return made[top : top + rows, left : left + columns]


def _merged(low: torch.Tensor, high: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """One step of synthesis along the last dimension, ``[n, m / 2]`` twice to ``[n, m − length + 2]``."""
    made = F.conv_transpose1d(torch.stack([low, high], 1), filters[:, None], stride=2)[:, 0]
    lost = filters.shape[1] - 2
    return made[:, lost : made.shape[1] - lost]
