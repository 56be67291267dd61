"""Uni-LoRA (arXiv 2506.00799): y += B (A x), every value of all A and B one of a single vector θ, over √(its uses).

Which value is where is random but even: every one of θ is used equally often, or once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import PREFIX, check_memory, method_sites, refuse_quantized, site_tensor, take_biases
from weft.adapters.methods.lora import MAX_RANK, with_biases
from weft.adapters.methods.places import TRANSPOSED_FIELDS
from weft.adapters.parts import LowRank

FIELDS = TRANSPOSED_FIELDS | FieldTable(
    honoured=(
        "r",
        "proj_seed",
        "theta_d_length",
        "save_indices",
        "bias",
        "layers_to_transform",
        "layers_pattern",
    ),
    ignored={
        "init_theta_d_bound": "how the vector was initialised before training",
        "unilora_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's UniLoraConfig."""

MAX_VALUES = 1 << 28
"""Of all A and B, where a small file says how many there are."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_quantized(sites, base, "Uni-LoRA", "peft rounds its scales to the integers that hold the weight")
    rank = config.integer("r", 4, low=1, high=MAX_RANK)
    length = config.integer("theta_d_length", 256, low=1, high=1 << 31)
    seed = config.integer("proj_seed", 42, low=0, high=(1 << 64) - 1)
    theta = checkpoint.tensors.take("base_model.unilora_theta_d", (length,)).float()
    check_memory(base, rank * sum(site.in_features + site.out_features for site in sites))
    biases = take_biases(checkpoint, base, sites)
    if config.flag("save_indices"):
        forms = {site.path: _saved(checkpoint, site, rank, theta) for site in sites}
    else:
        forms = _drawn(sites, rank, theta, seed, base.dtype)
    return with_biases(forms, biases, base)


def _saved(checkpoint: Checkpoint, site: Site, rank: int, theta: torch.Tensor) -> SiteForms:
    factors = []
    for part, shape in (("A", (rank, site.in_features)), ("B", (site.out_features, rank))):
        name = f"{PREFIX}{site.path}.unilora_indices_{part}"
        indices = checkpoint.tensors.take(name, shape, integers=True)
        # Negative ones count from the end, as everywhere in torch.
        if not -len(theta) <= int(indices.min()) <= int(indices.max()) < len(theta):
            raise AdapterFormatError(f"{show(name)} points outside the vector of {len(theta)}", param=name[:200])
        factors.append(theta[indices] * site_tensor(checkpoint, site, f"unilora_scales_{part}", shape))
    return SiteForms(LowRank(*factors))


def _drawn(
    sites: Sequence[Site], rank: int, theta: torch.Tensor, seed: int, dtype: torch.dtype
) -> dict[str, SiteForms]:
    """As peft draws them, for all sites at once: A and B of each in turn, in the base's order."""
    total = sum(rank * (site.in_features + site.out_features) for site in sites)
    if total > MAX_VALUES:
        raise AdapterUnsupported(f"r={rank} makes {total} values; the limit is {MAX_VALUES}", param="r")
    generator = np.random.default_rng(seed)
    often, more = divmod(total, len(theta))
    drawn = np.repeat(np.arange(len(theta)), often)
    if more:
        drawn = np.concatenate([drawn, generator.choice(len(theta), size=more, replace=False)])
    generator.shuffle(drawn)
    indices = torch.from_numpy(drawn)
    # peft keeps the scales in the dtype of the base.
    scales = torch.bincount(indices, minlength=len(theta)).float().rsqrt().to(dtype).float()
    values = (theta * scales)[indices]
    forms, start = {}, 0
    for site in sites:
        middle = start + rank * site.in_features
        end = middle + rank * site.out_features
        a, b = values[start:middle].view(rank, -1), values[middle:end].view(-1, rank)
        forms[site.path], start = SiteForms(LowRank(a, b)), end
    return forms
