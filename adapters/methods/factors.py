"""What the loaders of products share: the cheaper form of a product, ranks and scales of sites, random projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.base import Site
from weft.adapters.config_fields import ConfigFields, FieldTable, as_integer, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import lora
from weft.adapters.methods.common import COMMON_FIELDS
from weft.adapters.methods.targets import match_patterns
from weft.adapters.parts import LowRank

MAX_RANK = lora.MAX_RANK
MAX_PROJECTION = 1 << 28
"""Numbers in a projection that is drawn and not read: 1 GiB."""

PRODUCT_FIELDS = COMMON_FIELDS | FieldTable(
    ignored={"init_weights": "how the parameters were initialised before training"},
)
"""Fields that mean the same to these methods."""

FAN_FIELD = FieldTable(
    ignored={"fan_in_fan_out": "peft corrects it to what the module is: true for Conv1D, false for Linear"}
)


def numbers(rank: int, site: Site) -> int:
    """What an update of this rank takes: its factors, or a dense matrix where that is smaller."""
    return min(rank * (site.in_features + site.out_features), site.in_features * site.out_features)


def pays(rank: int, site: Site) -> bool:
    """Whether factors of this rank take less than the update as a dense matrix."""
    return rank * (site.in_features + site.out_features) < site.in_features * site.out_features


def product(b: torch.Tensor, a: torch.Tensor, site: Site) -> SiteForms:
    """``W += B A`` in the form that takes less: the factors, or their product where they are wide."""
    return SiteForms(LowRank(a, b)) if pays(a.shape[0], site) else SiteForms(delta=b @ a)


def refuse_conv1d(sites: Sequence[Site], method: str) -> None:
    """Of methods that peft has for ``nn.Linear`` only.

    Raises:
        AdapterUnsupported: a target is GPT-2's Conv1D.
    """
    for site in sites:
        if site.kind != "linear":
            raise AdapterUnsupported(
                f"target_modules selects {show(site.path)}, a Conv1D, which peft's {method} cannot adapt",
                param="target_modules",
            )


def site_ranks(config: ConfigFields, sites: Sequence[Site], default: int) -> dict[str, int]:
    """``r`` of every site by path, with the exceptions of ``rank_pattern``."""
    rank = config.integer("r", default, low=1, high=MAX_RANK)
    exceptions = match_patterns(config.mapping("rank_pattern"), sites, "rank_pattern")
    ranks = {path: as_integer("rank_pattern", r, low=1, high=MAX_RANK) for path, r in exceptions.items()}
    return {site.path: ranks.get(site.path, rank) for site in sites}


def site_alphas(config: ConfigFields, sites: Sequence[Site], default: float) -> dict[str, float]:
    """``alpha`` of every site by path, with the exceptions of ``alpha_pattern``."""
    alpha = config.number("alpha", default)
    exceptions = match_patterns(config.mapping("alpha_pattern"), sites, "alpha_pattern")
    alphas = {path: as_number("alpha_pattern", value) for path, value in exceptions.items()}
    return {site.path: alphas.get(site.path, alpha) for site in sites}


def projection_generator(config: ConfigFields) -> torch.Generator:
    """The generator peft draws shared projections from, seeded by ``projection_prng_key``."""
    seed = config.integer("projection_prng_key", 0, low=-(1 << 63), high=(1 << 64) - 1)
    return torch.Generator(device="cpu").manual_seed(seed)


def check_projection(rank: int, width: int) -> None:
    """Refuse to draw a projection that no adapter needs.

    Raises:
        AdapterFormatError: it is beyond ``MAX_PROJECTION``.
    """
    if rank * width > MAX_PROJECTION:
        raise AdapterFormatError(
            f"r={rank} asks for random projections of {rank} x {width} numbers; the limit is {MAX_PROJECTION}",
            param="r",
        )
