"""PEANuT (arXiv 2410.01870): ΔW = s · (B f(Wᵀ Aᵀ))ᵀ, where f is a small network without biases, with residuals.

f sees the frozen weight alone, so f(Wᵀ Aᵀ) is computed here, once, and what is left is a low-rank update.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import method_sites, site_tensor
from weft.adapters.methods.factors import MAX_RANK, PRODUCT_FIELDS, refuse_conv1d
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

MAX_DEPTH = 64

FIELDS = PRODUCT_FIELDS | FieldTable(honoured=("r", "depth", "act_fn", "scaling", *TARGET_FIELDS))
"""Every field of peft 0.21.2's PeanutConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "PEANuT")
    rank = config.integer("r", 32, low=1, high=MAX_RANK)
    depth = config.integer("depth", 0, low=0, high=MAX_DEPTH)
    scaling = config.number("scaling", 1.0)
    name = config.text("act_fn") or "relu"
    if name not in ACT2FN:
        raise AdapterUnsupported(f"act_fn={show(name)} is no activation of transformers", param="act_fn")
    activation: nn.Module = ACT2FN[name]
    forms = {}
    for site in sites:
        b = site_tensor(checkpoint, site, "peanut_B.weight", (site.out_features, rank))
        forms[site.path] = SiteForms(LowRank(_inner(checkpoint, base, site, rank, depth, activation), b * scaling))
    return forms


@torch.no_grad()
def _inner(
    checkpoint: Checkpoint, base: Base, site: Site, rank: int, depth: int, activation: nn.Module
) -> torch.Tensor:
    """f(Wᵀ Aᵀ)ᵀ, ``[rank, in]``."""

    def square(kind: str, index: int) -> torch.Tensor:
        return site_tensor(checkpoint, site, f"peanut_{kind}.{index}.weight", (rank, rank))

    a = site_tensor(checkpoint, site, "peanut_A.weight", (rank, site.out_features))
    hidden: torch.Tensor = activation(base.weight(site).T @ a.T)
    residuals: list[torch.Tensor] = []
    for index in range(depth):
        residuals.append(hidden)
        hidden = activation(hidden @ square("encoders", index).T)
    for index in range(depth):
        hidden = activation(hidden @ square("decoders", index).T) + residuals.pop()
    return hidden.T
