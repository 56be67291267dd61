"""GraLoRA (arXiv 2505.20355) as peft has it: k by k blocks of W have a LoRA of rank r / k each, and all of W
one of rank hybrid_r if that is set; times α / (r + hybrid_r)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import check_memory, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.parts import LowRank

FIELDS = (
    factors.PRODUCT_FIELDS
    | factors.FAN_FIELD
    | FieldTable(
        honoured=(
            "r",
            "alpha",
            "bias",
            "gralora_k",
            "hybrid_r",
            "target_modules",
            "layers_to_transform",
            "layers_pattern",
        ),
        ignored={"gralora_dropout": "no dropout at inference"},
    )
)
"""Every field of peft 0.21.2's GraloraConfig."""


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a config: blocks a side, the rank of all blocks in a row, of the rest, and the scale of both."""

    blocks: int
    rank: int
    hybrid: int
    scale: float

    @classmethod
    def read(cls, config: ConfigFields, sites: Sequence[Site]) -> _Sizes:
        rank = config.integer("r", 32, low=1, high=factors.MAX_RANK)
        hybrid = config.integer("hybrid_r", 0, low=0, high=factors.MAX_RANK)
        blocks = config.integer("gralora_k", 2, low=1, high=factors.MAX_RANK)
        if rank % blocks:
            raise AdapterFormatError(f"r={rank} must be a multiple of gralora_k={blocks}", param="gralora_k")
        for site in sites:
            if site.in_features % blocks or site.out_features % blocks:
                raise AdapterMismatch(
                    f"gralora_k={blocks} does not divide the widths of {site.path}, {site.in_features} in and "
                    f"{site.out_features} out",
                    param="gralora_k",
                )
        return cls(blocks, rank, hybrid, config.number("alpha", 64) / (rank + hybrid))


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    sizes = _Sizes.read(checkpoint.config, sites)
    check_memory(base, sum(factors.numbers(sizes.blocks * sizes.rank + sizes.hybrid, site) for site in sites))
    biases = take_biases(checkpoint, base, sites)
    forms = {site.path: _update(checkpoint, site, sizes) for site in sites}
    return with_biases(forms, biases, base)


def _update(checkpoint: Checkpoint, site: Site, sizes: _Sizes) -> SiteForms:
    k, rank = sizes.blocks, sizes.rank
    width_in, width_out = site.in_features // k, site.out_features // k
    a = site_tensor(checkpoint, site, "gralora_A", (k, width_in, rank)).view(k, width_in, k, rank // k)
    b = site_tensor(checkpoint, site, "gralora_B", (k, rank, width_out)).view(k, k, rank // k, width_out)
    b = b * sizes.scale
    rest_a = rest_b = None
    if sizes.hybrid:
        rest_a = site_tensor(checkpoint, site, "gralora_A_general.weight", (sizes.hybrid, site.in_features))
        rest_b = site_tensor(checkpoint, site, "gralora_B_general.weight", (site.out_features, sizes.hybrid))
        rest_b = rest_b * sizes.scale
    # Block (out o, in i) has the factors a[i, :, o, :] and b[o, i, :, :].
    if not factors.pays(k * rank + sizes.hybrid, site):
        delta = torch.einsum("oirv,iuor->oviu", b, a).reshape(site.out_features, site.in_features)
        return SiteForms(delta=delta if rest_a is None or rest_b is None else delta + rest_b @ rest_a)
    own = torch.eye(k)
    wide_a = torch.einsum("iuor,ij->oirju", a, own).reshape(k * rank, site.in_features)
    wide_b = torch.einsum("oirv,oj->jvoir", b, own).reshape(site.out_features, k * rank)
    if rest_a is None or rest_b is None:
        return SiteForms(LowRank(wide_a, wide_b))
    return SiteForms(LowRank(torch.cat([wide_a, rest_a]), torch.cat([wide_b, rest_b], dim=1)))
