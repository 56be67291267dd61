"""Lily (arXiv 2407.09946): layers share a way down and several ways up, which each layer weighs in its own way.

``y += s · Σ_e p_e B_e (A x)``, with p the mean of ``softmax(R A x)`` over the tokens of a forward pass. The modules
that one name of ``target_modules`` selects, as far as their weights are of one shape, share all B, and every
``stride_A`` of them in a row A; R is each one's own. peft saves what is shared once for every module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, check_memory, method_sites, site_tensor
from weft.adapters.methods.targets import ALL_LINEAR, LONG_LIST, TARGET_FIELDS
from weft.adapters.parts import Gate, GatedLowRank
from weft.kernels.mean_gates import MAX_GATES, Link

MAX_RANK = 1 << 14
MAX_STRIDE = 1 << 16

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("r", "stride_A", "num_B", "scaling", *TARGET_FIELDS),
    ignored={"init_weights": "how the weights were initialised before training"},
)
"""Every field of peft 0.21.2's LilyConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    _check_sites(sites, base)
    rank = config.integer("r", 32, low=1, high=MAX_RANK)
    count = config.integer("num_B", 2, low=2, high=min(MAX_GATES, *(site.in_features for site in sites)))
    stride = config.integer("stride_A", 1, low=1, high=MAX_STRIDE)
    scaling = config.number("scaling", 1.0)
    check_memory(base, sum(rank * (site.in_features + count * site.out_features) for site in sites))
    forms = {}
    for group in _groups(checkpoint, base, sites):
        downs = [site_tensor(checkpoint, site, "lily_A.weight", (rank, site.in_features)) for site in group]
        ups = [site_tensor(checkpoint, site, "lily_B.weight", (count * rank, site.out_features)) for site in group]
        for index, site in enumerate(group):
            _check_shared(site, downs[index], downs[index // stride * stride], "A")
            _check_shared(site, ups[index], ups[0], "B")
            router = site_tensor(checkpoint, site, "lily_router.weight", (count, rank))
            gate = Gate(router @ downs[index], torch.zeros(count), Link.SOFTMAX)
            forms[site.path] = SiteForms(gated=GatedLowRank(downs[index], scaling * ups[index].T, gate))
    return {site.path: forms[site.path] for site in sites}


def _check_sites(sites: Sequence[Site], base: Base) -> None:
    for site in sites:
        if site.kind != "linear":
            raise AdapterUnsupported(
                f"target_modules selects {show(site.path)}, which is no nn.Linear; peft has Lily for nothing else",
                param="target_modules",
            )
        if site.path == base.head:
            raise AdapterUnsupported(
                f"target_modules selects the head {show(site.path)}, where the mean depends on how many tokens' logits "
                "are asked for",
                param="target_modules",
            )


def _groups(checkpoint: Checkpoint, base: Base, sites: Sequence[Site]) -> list[list[Site]]:
    """The sites that share, as peft's ``_post_injection_hook`` finds them: by the name that selects them, and shape.

    Raises:
        AdapterUnsupported: which they are depends on more than the config.
    """
    targets = checkpoint.config.names("target_modules")
    if targets is None:
        targets = defaults.LORA[base.model_type]
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = tuple({site.path.rpartition(".")[2] for site in sites})
    elif isinstance(targets, str) and any(site.path in base.quantized for site in sites):
        raise AdapterUnsupported(
            "target_modules is a pattern, and peft shares between modules whose packed weights are of one shape",
            param="target_modules",
        )
    elif not isinstance(targets, str) and len(targets) >= LONG_LIST:
        raise AdapterUnsupported(
            f"with {len(targets)} target_modules, which layers share depends on how peft shortens the list",
            param="target_modules",
        )
    groups: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        names = [targets] if isinstance(targets, str) else [name for name in targets if site.path.endswith(name)]
        if len(names) != 1:
            raise AdapterUnsupported(
                f"{show(site.path)} ends in {show(names)}; which of them peft shares it by is left to chance",
                param="target_modules",
            )
        groups.setdefault((names[0], site.out_features, site.in_features), []).append(site)
    return list(groups.values())


def _check_shared(site: Site, own: torch.Tensor, shared: torch.Tensor, which: str) -> None:
    """peft loads every copy of what is shared into the same place, so the last one would count."""
    if not torch.equal(own, shared):
        raise AdapterMismatch(
            f"lily_{which} of {show(site.path)} differs from that of the layers it is shared with",
            param=f"lily_{which}",
        )
