"""SHiRA (arXiv 2406.13175): W' = W + S, with trained values at few places of S, which the file names."""

from __future__ import annotations

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, as_integer, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import PREFIX, method_sites, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.places import LINEAR_FIELDS, sparse_update

FIELDS = LINEAR_FIELDS | FieldTable(
    honoured=("r",),
    ignored={
        "fan_in_fan_out": "peft adapts no Conv1D with SHiRA",
        "mask_type": "how the places were chosen; they are saved",
        "random_seed": "how the places were chosen; they are saved",
    },
)
"""Every field of peft 0.21.2's ShiraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.NARROW_PHI)
    refuse_conv1d(sites, "SHiRA")
    r = checkpoint.config.integer("r", 32, low=1, high=1 << 24)
    return {site.path: _site_forms(checkpoint, base, site, r) for site in sites}


def _site_forms(checkpoint: Checkpoint, base: Base, site: Site, r: int) -> SiteForms:
    # As many values as a LoRA of rank r, and no more than W has.
    as_integer("r", r, low=1, high=site.in_features * site.out_features // (site.in_features + site.out_features))
    count = r * (site.in_features + site.out_features)
    values = site_tensor(checkpoint, site, "shira_weight", (count,))
    name = f"{PREFIX}{site.path}.shira_indices"
    rows, columns = checkpoint.tensors.take(name, (2, count), integers=True)
    if bool((columns < 0).any()) or bool((columns >= site.in_features).any()):
        raise AdapterFormatError(f"{show(name)} has columns beyond {site.in_features}", param=name[:200])
    return sparse_update(base, site, rows * site.in_features + columns, values, name)
