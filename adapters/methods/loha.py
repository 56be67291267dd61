"""LoHa (arXiv 2108.06098) as peft has it: W += α / r · (w1a w1b) ⊙ (w2a w2b), of rank r² at most (Khatri-Rao)."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import check_memory, method_sites, site_tensor
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

LYCORIS_FIELDS = factors.PRODUCT_FIELDS | FieldTable(
    honoured=("r", "alpha", "rank_pattern", "alpha_pattern", *TARGET_FIELDS),
    ignored={
        "module_dropout": "no dropout at inference",
        "rank_dropout": "no dropout at inference",
        "use_effective_conv2d": "of convolutions",
    },
)
"""Also of LoKr."""

FIELDS = LYCORIS_FIELDS
"""Every field of peft 0.21.2's LoHaConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "LoHa")
    ranks = factors.site_ranks(checkpoint.config, sites, 8)
    alphas = factors.site_alphas(checkpoint.config, sites, 8)
    check_memory(base, sum(factors.numbers(ranks[site.path] ** 2, site) for site in sites))
    return {
        site.path: _update(checkpoint, site, ranks[site.path], alphas[site.path] / ranks[site.path]) for site in sites
    }


def _update(checkpoint: Checkpoint, site: Site, rank: int, scale: float) -> SiteForms:
    up, down = (site.out_features, rank), (rank, site.in_features)
    b1 = site_tensor(checkpoint, site, "hada_w1_a", up) * scale
    a1 = site_tensor(checkpoint, site, "hada_w1_b", down)
    b2 = site_tensor(checkpoint, site, "hada_w2_a", up)
    a2 = site_tensor(checkpoint, site, "hada_w2_b", down)
    if not factors.pays(rank * rank, site):
        return SiteForms(delta=(b1 @ a1) * (b2 @ a2))
    return SiteForms(LowRank(a=_row_pairs(a1, a2), b=_row_pairs(b1.T, b2.T).T))


def _row_pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Every row of ``first`` times every row of ``second``."""
    return (first[:, None] * second[None]).flatten(end_dim=1)
