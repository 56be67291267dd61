"""DeLoRA (arXiv 2503.18225) as peft has it: W += B diag(λ / (r ‖a_i‖ ‖b_i‖)) A diag(n), n the norms of W's columns."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

LEAST_NORM = 1e-4
"""peft divides by no less."""

FIELDS = factors.PRODUCT_FIELDS | FieldTable(
    honoured=("r", "bias", "rank_pattern", *TARGET_FIELDS),
    ignored={
        "delora_lambda": "what λ was before training; it is saved",
        "lambda_pattern": "what λ was before training; it is saved",
        "module_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's DeloraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The norms of W's columns are those saved with the adapter, as with peft."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "DeLoRA")
    ranks = factors.site_ranks(checkpoint.config, sites, 8)
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        rank = ranks[site.path]
        a = site_tensor(checkpoint, site, "delora_A", (rank, site.in_features))
        b = site_tensor(checkpoint, site, "delora_B", (site.out_features, rank))
        strength = site_tensor(checkpoint, site, "delora_lambda", (1,))
        columns = site_tensor(checkpoint, site, "delora_w_norm", (site.in_features,))
        norms = a.norm(dim=1).clamp(min=LEAST_NORM) * b.norm(dim=0).clamp(min=LEAST_NORM)
        forms[site.path] = factors.product(b * (strength / rank / norms), a * columns, site)
    return with_biases(forms, biases, base)
