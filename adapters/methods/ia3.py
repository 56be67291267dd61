"""IA3 (arXiv 2205.05638) as peft has it: the output of attention's k and v is scaled, bias and all, by a trained
vector; of the feed-forward's modules it is the input."""

from __future__ import annotations

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, method_sites, site_tensor
from weft.adapters.methods.targets import Selector
from weft.adapters.patterns import first_matches, is_plain

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("target_modules", "exclude_modules", "feedforward_modules"),
    ignored={
        "fan_in_fan_out": "peft corrects it to what the module is: true for Conv1D, false for Linear",
        "init_ia3_weights": "how the vectors were initialised before training",
    },
)
"""Every field of peft 0.21.2's IA3Config."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.IA3)
    feedforward: Selector | None = config.names("feedforward_modules")
    if feedforward is None:
        if base.model_type not in defaults.IA3_FEEDFORWARD:
            raise AdapterUnsupported(
                f"feedforward_modules is not given, and peft has no default for {base.model_type}",
                param="feedforward_modules",
            )
        feedforward = defaults.IA3_FEEDFORWARD[base.model_type]
    scaled_inputs = _feedforward_paths(feedforward, sites)
    forms: dict[str, SiteForms] = {}
    for site in sites:
        if site.path in scaled_inputs:
            forms[site.path] = SiteForms(gain_in=site_tensor(checkpoint, site, "ia3_l", (1, site.in_features))[0])
        else:
            forms[site.path] = SiteForms(gain_out=site_tensor(checkpoint, site, "ia3_l", (site.out_features, 1))[:, 0])
    return forms


def _feedforward_paths(selector: Selector, sites: list[Site]) -> frozenset[str]:
    """peft's own rule: a pattern for the whole path, or endings of it, dot or no dot."""
    paths = [site.path for site in sites]
    if isinstance(selector, str):
        hits = first_matches([selector], paths, param="feedforward_modules", full=True, plain=is_plain(selector))
        return frozenset(path for path, hit in zip(paths, hits, strict=True) if hit is not None)
    return frozenset(path for path in paths if path.endswith(tuple(selector)))
