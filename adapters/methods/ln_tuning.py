"""LayerNorm tuning (arXiv 2312.11420): norms with a weight and bias of the adapter's own."""

from __future__ import annotations

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import (
    COMMON_FIELDS,
    check_task,
    site_tensor,
)
from weft.adapters.methods.targets import targeted_sites

FIELDS = COMMON_FIELDS | FieldTable(honoured=("target_modules", "exclude_modules"))
"""Every field of peft 0.21.2's LNTuningConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    check_task(checkpoint.config)
    checkpoint.config.check(FIELDS)
    sites = targeted_sites(checkpoint.config, base, defaults.LN_TUNING, norms=True)
    return {site.path: _own_norm(checkpoint, site) for site in sites}


def _own_norm(checkpoint: Checkpoint, site: Site) -> SiteForms:
    shape = (site.out_features,)
    bias = site_tensor(checkpoint, site, "ln_tuning_layers.bias", shape) if site.has_bias else None
    return SiteForms(weight=site_tensor(checkpoint, site, "ln_tuning_layers.weight", shape), bias=bias)
