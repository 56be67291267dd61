"""Super-Tuning (arXiv 2607.09287): W' = W + S, with trained values where |W| is largest (or smallest); and with a LoRA
beside it ("Supra"), y += α / r · B (A x)."""

from __future__ import annotations

from dataclasses import replace

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, as_integer, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import PREFIX, method_sites, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import MAX_RANK
from weft.adapters.methods.places import LINEAR_FIELDS, sparse_update
from weft.adapters.parts import LowRank

FIELDS = LINEAR_FIELDS | FieldTable(
    honoured=("sparsity", "select_top", "save_precomputed_indices", "r", "lora_alpha"),
    ignored={"lora_dropout": "no dropout at inference"},
)
"""Every field of peft 0.21.2's SupertuningConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "Super-Tuning")
    sparsity = config.number("sparsity", 0.99)
    if not 0 <= sparsity < 1:
        raise AdapterFormatError(f"sparsity must be in [0, 1), got {sparsity}", param="sparsity")
    largest, saved = config.flag("select_top", True), config.flag("save_precomputed_indices", True)
    rank, scale = _lora(config)
    forms = {}
    for site in sites:
        count = int(site.in_features * site.out_features * (1 - sparsity))
        if not count:
            raise AdapterFormatError(f"sparsity {sparsity} leaves no value of {site.path}", param="sparsity")
        values = site_tensor(checkpoint, site, "supertuning_values", (count,))
        name = f"{PREFIX}{site.path}.supertuning_indices"
        if saved:
            places = checkpoint.tensors.take(name, (count,), integers=True)
        else:
            places = _extremes(base.weight(site), count, largest, site)
        forms[site.path] = replace(
            sparse_update(base, site, places, values, name),
            low_rank=_low_rank(checkpoint, site, rank, scale) if rank else None,
        )
    return forms


def _lora(config: ConfigFields) -> tuple[int, float]:
    """Rank, 0 without a LoRA, and scale."""
    r, alpha = config.value("r", None), config.value("lora_alpha", None)
    if r is None:
        if alpha is not None:
            raise AdapterFormatError(f"lora_alpha={show(alpha)} has no meaning without r", param="lora_alpha")
        return 0, 0.0
    rank = as_integer("r", r, low=1, high=MAX_RANK)
    return rank, (2.0 if alpha is None else as_number("lora_alpha", alpha) / rank)


def _low_rank(checkpoint: Checkpoint, site: Site, rank: int, scale: float) -> LowRank:
    a = site_tensor(checkpoint, site, "supertuning_lora_A.weight", (rank, site.in_features))
    b = site_tensor(checkpoint, site, "supertuning_lora_B.weight", (site.out_features, rank))
    return LowRank(a, b * scale)


def _extremes(weight: torch.Tensor, count: int, largest: bool, site: Site) -> torch.Tensor:
    """The places of the ``count`` largest or smallest of |W|, in the order of the values.

    Raises:
        AdapterUnsupported: two are equal. Which comes first then depends on the device that trained the adapter.
    """
    magnitudes = weight.abs().flatten()
    found, places = magnitudes.topk(min(count + 1, len(magnitudes)), largest=largest)
    if bool((found[1:] == found[:-1]).any()):
        raise AdapterUnsupported(
            f"save_precomputed_indices=false is not served here: {site.path} has values of equal size, between which "
            "the file does not decide; save the adapter with save_precomputed_indices=true",
            param="save_precomputed_indices",
        )
    return places[:count]
