"""BEFT (arXiv 2509.15974): y = W x + b0 + β, whether the base has a bias or not."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import method_sites, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.places import LINEAR_FIELDS

FIELDS = LINEAR_FIELDS
"""Every field of peft 0.21.2's BeftConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.BEFT)
    refuse_conv1d(sites, "BEFT")
    return {
        site.path: SiteForms(shift=site_tensor(checkpoint, site, "beft_bias", (1, site.out_features))[0])
        for site in sites
    }
