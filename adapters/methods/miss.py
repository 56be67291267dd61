"""MiSS (arXiv 2409.15371) as peft has it: inputs r apart are summed, and a block of r rows maps the sums to the output.

With init_weights="mini" the block is narrow, and repeated along the output; with "bat" W itself is multiplied by it, r
by r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import COMMON_FIELDS, check_memory, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("r", "mini_r", "init_weights", "bias", *TARGET_FIELDS),
    ignored={"miss_dropout": "no dropout at inference"},
)
"""Every field of peft 0.21.2's MissConfig. What init_weights names is no way to begin, but a method each."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "MiSS")
    rank = config.integer("r", 64, low=1, high=factors.MAX_RANK)
    repeated = config.integer("mini_r", 1, low=0, high=1 << 31)
    variant = _variant(config)
    _check_widths(sites, rank, repeated, variant)
    made = rank if variant == "std" else min(rank, repeated)
    check_memory(base, sum(factors.numbers(site.in_features if variant == "bat" else made, site) for site in sites))
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        if variant == "bat":
            forms[site.path] = _multiplied(checkpoint, base, site, rank)
        else:
            width = repeated if variant == "mini" else site.out_features
            block = site_tensor(checkpoint, site, "miss_block", (rank, width))
            forms[site.path] = _added(block, site)
    return with_biases(forms, biases, base)


def _variant(config: ConfigFields) -> str:
    value = config.value("init_weights", True)
    if isinstance(value, bool):
        return "std"
    if value in ("bat", "mini"):
        return str(value)
    raise AdapterUnsupported(f"init_weights={show(value)} is no variant of MiSS", param="init_weights")


def _check_widths(sites: Sequence[Site], rank: int, repeated: int, variant: str) -> None:
    """peft's own limits.

    Raises:
        AdapterMismatch: a site's widths are no multiple of what they must be.
    """
    for site in sites:
        if rank > site.in_features:
            raise AdapterMismatch(f"r={rank} is more than the {site.in_features} inputs of {site.path}", param="r")
        if variant == "bat" and (site.in_features % rank or site.out_features % rank):
            raise AdapterMismatch(f"r={rank} does not divide both widths of {site.path}", param="r")
        if variant == "mini" and (not repeated or site.out_features % repeated):
            raise AdapterMismatch(f"mini_r={repeated} does not divide the output of {site.path}", param="mini_r")


def _added(block: torch.Tensor, site: Site) -> SiteForms:
    """``block`` ``[r, n]`` is repeated until the site is as wide; of r and n the smaller makes the rank."""
    rank, width = block.shape
    sums = torch.eye(rank)[:, torch.arange(site.in_features) % rank]
    if width >= rank:
        return factors.product(block.T.repeat(site.out_features // width, 1), sums, site)
    return factors.product(torch.eye(width).repeat(site.out_features // width, 1), block.T @ sums, site)


def _multiplied(checkpoint: Checkpoint, base: Base, site: Site, rank: int) -> SiteForms:
    """Every block of W, r by r, times that of its outputs, plus that block itself."""
    rows, columns = site.out_features // rank, site.in_features // rank
    block = site_tensor(checkpoint, site, "miss_block", (rows, rank, rank))
    weight = base.weight(site).reshape(rows, rank * columns, rank)
    update = (weight @ block).view(rows, rank, columns, rank) + block[:, :, None]
    return SiteForms(delta=update.reshape(site.out_features, site.in_features))
