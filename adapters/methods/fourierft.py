"""FourierFT (arXiv 2405.03003): ΔW = scaling · Re(ifft2(F)), F zero but for trained values at random places.

A value at (p, q) of F [M, N] is the wave cos(2π (p i / M + q j / N)) / (M N) of rank 2, so few of them are low-rank.
"""

from __future__ import annotations

import math

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import check_memory, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.places import SEEDS, TRANSPOSED_FIELDS, RandomPlaces, count_of_sites, scattered
from weft.adapters.methods.targets import DOTTED_KEY, TARGET_FIELDS
from weft.adapters.parts import LowRank

FIELDS = TRANSPOSED_FIELDS | FieldTable(
    honoured=("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "bias", *TARGET_FIELDS[1:]),
)
"""Every field of peft 0.21.2's FourierFTConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.SPECTRAL)
    counts = count_of_sites(config, "n_frequency", 1000, sites, key_format=DOTTED_KEY)
    check_memory(base, sum(factors.numbers(2 * counts[site.path], site) for site in sites))
    scaling = config.number("scaling", 150.0)
    places = RandomPlaces(config.integer("random_loc_seed", 777, **SEEDS))
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        count = counts[site.path]
        spectrum = site_tensor(checkpoint, site, "fourierft_spectrum", (count,)) * scaling
        forms[site.path] = _waves(site, places.of(site, count), spectrum)
    return with_biases(forms, biases, base)


def _waves(site: Site, places: torch.Tensor, spectrum: torch.Tensor) -> SiteForms:
    rows, columns = site.out_features, site.in_features
    if 2 * len(places) * (rows + columns) >= rows * columns:
        return SiteForms(delta=torch.fft.ifft2(scattered(site, places, spectrum, "fourierft_spectrum")).real)
    # cos(α + β) = cos α cos β − sin α sin β
    alpha, beta = _angles(places // columns, rows), _angles(places % columns, columns)
    amplitude = spectrum.double()[:, None] / (rows * columns)
    b = torch.cat([amplitude * alpha.cos(), -amplitude * alpha.sin()])
    return SiteForms(LowRank(torch.cat([beta.cos(), beta.sin()]).float(), b.T.float()))


def _angles(frequencies: torch.Tensor, length: int) -> torch.Tensor:
    """2π f i / length for each frequency f and each i, ``[len(frequencies), length]``, in fp64."""
    # Whole turns are dropped while the numbers are integers, which costs no precision.
    return (frequencies[:, None] * torch.arange(length) % length).double() * (2 * math.pi / length)
