"""RoAd (arXiv 2409.00119) as peft has it: y = c1 ⊙ z + c2 ⊙ rot(z), z = W x + b0, where rot takes pairs (z1, z2) to
(−z2, z1), c1 = α cos θ and c2 = α sin θ. The elements of a pair are half a group apart."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, method_sites, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.parts import Turn

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("variant", "group_size", "target_modules"),
    ignored={"init_weights": "how the parameters were initialised before training"},
)
"""Every field of peft 0.21.2's RoadConfig."""

VARIANTS = ("road_1", "road_2", "road_4")
"""One angle and one scale for each pair, for each element, and for each of an element's two factors."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "RoAd")
    variant = config.text("variant") or VARIANTS[0]
    if variant not in VARIANTS:
        raise AdapterFormatError(f"variant must be one of {', '.join(VARIANTS)}, got {show(variant)}", param="variant")
    group = config.integer("group_size", 64, low=2, high=1 << 24)
    if group % 2:
        raise AdapterFormatError(f"group_size must be even, got {group}", param="group_size")
    forms = {}
    for site in sites:
        forms[site.path] = SiteForms(turn=_turn(checkpoint, site, variant, group))
    return forms


def _turn(checkpoint: Checkpoint, site: Site, variant: str, group: int) -> Turn:
    if site.out_features % group:
        raise AdapterMismatch(
            f"group_size={group} does not divide the {site.out_features} outputs of {site.path}", param="group_size"
        )
    each = {"road_1": group // 2, "road_2": group, "road_4": 2 * group}[variant]
    shape = (site.out_features // group * each,)
    theta, alpha = (
        site_tensor(checkpoint, site, part, shape).double().view(-1, each // (group // 2), group // 2)
        for part in ("road_theta", "road_alpha")
    )
    own, other = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_4":
        own, other = own[:, :2], other[:, 2:]
    signs = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    rows = torch.stack([(own - 1).expand(-1, 2, -1).flatten(), (signs * other).flatten()])
    return Turn(rows.float(), group // 2)
