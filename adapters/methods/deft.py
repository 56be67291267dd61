"""DEFT (arXiv 2509.22793) as peft has it: W becomes (I − Q Pᵣᵀ) W + s Q R with s = α / r, or 1; by P alone, Q = P and
Pᵣ = relu(P), or both are the Q of its QR decomposition. With para there is no R."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, as_number, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = (
    factors.PRODUCT_FIELDS
    | factors.FAN_FIELD
    | FieldTable(
        honoured=("r", "alpha", "bias", "decomposition_method", "para", *TARGET_FIELDS),
        ignored={
            "deft_dropout": "no dropout at inference",
            "init_scale": "how R was initialised before training",
        },
    )
)
"""Every field of peft 0.21.2's DeftConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. ΔW = Q (s R − Pᵣᵀ W) has the rank of Q."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    rank = config.integer("r", 8, low=1, high=factors.MAX_RANK)
    orthogonal, removes = _orthogonal(config), config.flag("para")
    alpha = as_number("alpha", config.value("alpha", 0))
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        # peft makes no more directions than there are outputs.
        count = min(rank, site.out_features)
        left, right = _directions(checkpoint, site, count, orthogonal=orthogonal)
        a = -(right.T @ base.weight(site))
        if not removes:
            injected = site_tensor(checkpoint, site, "deft_R", (count, site.in_features))
            a += injected * (alpha / count if alpha else 1.0)
        forms[site.path] = factors.product(left, a, site)
    return with_biases(forms, biases, base)


def _orthogonal(config: ConfigFields) -> bool:
    method = config.value("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise AdapterFormatError(
            f"decomposition_method must be relu or qr, got {show(method)}", param="decomposition_method"
        )
    return method == "qr"


def _directions(
    checkpoint: Checkpoint, site: Site, count: int, *, orthogonal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and Pᵣ, both ``[out, count]``."""
    directions = site_tensor(checkpoint, site, "deft_P", (site.out_features, count))
    if not orthogonal:
        return directions, directions.relu()
    basis: torch.Tensor = torch.linalg.qr(directions).Q
    return basis, basis
