"""OSF (arXiv 2504.07097): W' = H + U diag(s) V, where H is the largest part of W's singular value decomposition.

So the update is U diag(s) V less the rest of W, of twice the rest's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import DECOMPOSED, method_sites, refuse_quantized, site_tensor
from weft.adapters.methods.factors import product, refuse_conv1d
from weft.adapters.methods.places import LINEAR_FIELDS
from weft.adapters.methods.targets import Selector
from weft.adapters.patterns import first_matches

FIELDS = LINEAR_FIELDS | FieldTable(
    honoured=("effective_rank", "rank_pattern"),
    ignored={"target_svd_config": "peft does not read it"},
)
"""Every field of peft 0.21.2's OSFConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, _defaults(base))
    refuse_quantized(sites, base, "OSF", DECOMPOSED)
    refuse_conv1d(sites, "OSF")
    kept = _kept_ranks(checkpoint.config, sites)
    forms = {site.path: _site_forms(checkpoint, base, site, kept[site.path]) for site in sites}
    return {path: form for path, form in forms.items() if form.parts()}


def _defaults(base: Base) -> Mapping[str, Selector]:
    """Where peft knows no targets, it adapts every linear but the head."""
    if base.model_type in defaults.OSF:
        return defaults.OSF
    return {base.model_type: tuple(path for path in base.sites if path != base.head)}


def _site_forms(checkpoint: Checkpoint, base: Base, site: Site, kept: int) -> SiteForms:
    rank = min(site.in_features, site.out_features) - kept
    new_left = site_tensor(checkpoint, site, "osf_svd_params.U_low", (site.out_features, rank))
    new_values = site_tensor(checkpoint, site, "osf_svd_params.S_low", (rank,))
    new_right = site_tensor(checkpoint, site, "osf_svd_params.V_low", (rank, site.in_features))
    if not rank:
        return SiteForms()
    left, values, right = torch.linalg.svd(base.weight(site), full_matrices=False)
    if values[kept] > 0 and values[kept - 1] - values[kept] <= torch.finfo(values.dtype).eps * values[0]:
        raise AdapterUnsupported(
            f"{site.path} has equal singular values at effective_rank {kept}, so the part that was trained is not "
            "determined",
            param="effective_rank",
        )
    # peft keeps both parts in the dtype of the base; what is left of W must be rounded as what was trained first was.
    left, values, right = (part[kept:].to(base.dtype).float() for part in (left.T, values, right))
    b = torch.cat([new_left * new_values, -left.T * values], 1)
    return product(b, torch.cat([new_right, right]), site)


def _kept_ranks(config: ConfigFields, sites: Sequence[Site]) -> dict[str, int]:
    """By path, how many singular values stay as they are."""
    patterns = config.mapping("rank_pattern")
    keys, paths = list(patterns), [site.path for site in sites]
    # Anywhere in the path, unlike other methods' patterns.
    searched = [f".*?(?:{key})" for key in keys]
    hits = first_matches(searched, paths, param="rank_pattern", full=False) if keys else [None] * len(paths)
    usual = config.value("effective_rank", None)
    ranks = {}
    for site, hit in zip(sites, hits, strict=True):
        most = min(site.in_features, site.out_features)
        value, param = (usual, "effective_rank") if hit is None else (patterns[keys[hit[0]]], "rank_pattern")
        ranks[site.path] = _kept_rank(value, most, param)
    return ranks


def _kept_rank(value: object, most: int, param: str) -> int:
    """A number of singular values, a share of them, or None for half."""
    if value is None:
        rank = most // 2
    elif isinstance(value, float) and 0 < value <= 1:
        rank = int(most * value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value < 1 << 31:
        rank = min(most, int(value))
    else:
        rank = 0
    if rank < 1:
        raise AdapterFormatError(f"{param} must be a positive number, got {show(value)}", param=param)
    return rank
