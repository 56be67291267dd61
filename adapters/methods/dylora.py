"""DyLoRA (arXiv 2210.07558): a LoRA trained so that its first b ranks are one as well, for every b up to r.

y += (α / b) · B[:, :b] (A[:b] x): the authors' code scales either factor by √(r / b) (huawei-noah/Efficient-NLP,
``DyLoRA/loralib``). peft has no such type, and nothing in a LoRA's tensors tells whether its ranks are nested, so the
config says so: ``"peft_type": "DYLORA"``, with peft's names for the other fields, and either peft's names for the
tensors or loralib's.
"""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.choices import Choice
from weft.adapters.config_fields import FieldTable, Neutral
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import PREFIX, method_sites
from weft.adapters.methods.lora import MAX_RANK, SHARED_FIELDS
from weft.adapters.methods.lora_factors import HARMLESS_INITS
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

FIELDS = SHARED_FIELDS | FieldTable(
    honoured=("r", "lora_alpha", *TARGET_FIELDS),
    ignored={"merge_weights": "loralib's: when it adds the update to the weight"},
    neutral={
        "alpha_pattern": Neutral("the authors' code has one scale for all modules"),
        "bias": Neutral("the authors' code trains A and B alone", also=("none",)),
        "ensure_weight_tying": Neutral("it adapts the head as the embedding"),
        "init_lora_weights": Neutral("the base weights were changed before training", also=HARMLESS_INITS),
        "lora_bias": Neutral("the authors' code trains A and B alone"),
        "rank_pattern": Neutral("the authors' code has one rank for all modules"),
        "trainable_token_indices": Neutral("the authors' code trains A and B alone"),
        "use_rslora": Neutral("the authors' code scales by the rank"),
    },
)
"""The fields of peft 0.21.2's LoraConfig, and loralib's own."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The ranks beyond the chosen one are left out, not set to zero."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    full = config.integer("r", 8, low=1, high=MAX_RANK)
    alpha = config.number("lora_alpha", 8)
    rank = checkpoint.per_request.choose(Choice("lora_rank", 1, full, default=full))
    forms = {}
    for site in sites:
        a = _factor(checkpoint, site, "lora_A", (full, site.in_features))[:rank]
        b = _factor(checkpoint, site, "lora_B", (site.out_features, full))[:, :rank]
        forms[site.path] = SiteForms(LowRank(a, b * (alpha / rank)))
    return forms


def _factor(checkpoint: Checkpoint, site: Site, part: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One factor, fp32, by peft's name or by loralib's, which is the parameter's own in the model."""
    own = f"{site.path}.{part}"
    name = own if own in checkpoint.tensors else f"{PREFIX}{own}.weight"
    return checkpoint.tensors.take(name, shape).float()
