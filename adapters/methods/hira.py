"""HiRA (openreview TwJrTz9cRS) as peft has it: W += W ⊙ (B A), element by element, of full rank."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import check_dense, method_sites, site_tensor
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = (
    factors.PRODUCT_FIELDS
    | factors.FAN_FIELD
    | FieldTable(
        honoured=("r", *TARGET_FIELDS),
        ignored={
            "hira_dropout": "no dropout at inference",
            "rank_pattern": "peft looks it up and then gives every module rank r",
        },
    )
)
"""Every field of peft 0.21.2's HiraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    check_dense(base, sites)
    rank = checkpoint.config.integer("r", 32, low=1, high=factors.MAX_RANK)
    forms = {}
    for site in sites:
        a = site_tensor(checkpoint, site, "hira_A", (rank, site.in_features))
        b = site_tensor(checkpoint, site, "hira_B", (site.out_features, rank))
        forms[site.path] = SiteForms(delta=base.weight(site) * (b @ a))
    return forms
