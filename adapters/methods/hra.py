"""HRA (arXiv 2405.17484) as peft has it: W becomes W H, where H = Π (I − 2 u_i u_iᵀ) reflects the input; with apply_GS
H = I − 2 Q Qᵀ, Q the u_i made orthonormal. ΔW = −(W V) Uᵀ is low-rank."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint, is_finite
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import PREFIX, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

MAX_ORTHOGONAL = 512
"""Ranks with apply_GS, whose time grows with the square: about a second for each site."""

FIELDS = factors.PRODUCT_FIELDS | FieldTable(honoured=("r", "apply_GS", "bias", *TARGET_FIELDS))
"""Every field of peft 0.21.2's HRAConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "HRA")
    orthogonal = config.flag("apply_GS")
    rank = config.integer("r", 8, low=1, high=MAX_ORTHOGONAL if orthogonal else factors.MAX_RANK)
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        left, right = _reflection(checkpoint, site, rank, orthogonal=orthogonal)
        forms[site.path] = factors.product(-(base.weight(site) @ left), right.T, site)
    return with_biases(forms, biases, base)


def _reflection(
    checkpoint: Checkpoint, site: Site, rank: int, *, orthogonal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """V and U, both ``[in, rank]``, of H = I − V Uᵀ."""
    vectors = site_tensor(checkpoint, site, "hra_u", (site.in_features, rank))
    if orthogonal:
        if rank > site.in_features:
            raise AdapterFormatError(
                f"r={rank} with apply_GS is more than the {site.in_features} directions {site.path} has: the others "
                "are rounding errors, of any length",
                param="r",
            )
        right = _orthonormal(vectors)
        left = 2 * right
    else:
        right = vectors / vectors.norm(dim=0)
        left = _product(right)
    if not is_finite(left):
        name = f"{PREFIX}{site.path}.hra_u"
        raise AdapterFormatError(f"{name} holds a vector without a direction", param=name[:200])
    return left, right


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt one vector at a time, as peft does it in every forward pass.

    peft begins with pairs of equal vectors, so that after little training rounding shows: it must be the same.
    """
    units: list[torch.Tensor] = []
    for i in range(vectors.shape[1]):
        vector = vectors[:, i : i + 1]
        for unit in units:
            vector = vector - (unit.T @ vector) * unit
        units.append(vector / vector.norm())
    return torch.cat(units, dim=1)


def _product(units: torch.Tensor) -> torch.Tensor:
    """V of Π (I − 2 u_i u_iᵀ) = I − V Uᵀ: each reflection adds one column, itself reflected by those before."""
    left = torch.zeros_like(units)
    for i in range(units.shape[1]):
        unit = units[:, i]
        left[:, i] = 2 * (unit - left[:, :i] @ (units[:, :i].T @ unit))
    return left
