"""AdaLoRA (arXiv 2303.10512) as peft has it: y += α / (init_r + 1e-5) · B ((A ⊙ E) x), pruned ranks left out."""

from __future__ import annotations

from collections.abc import Mapping

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, lora
from weft.adapters.methods.common import PREFIX, method_sites, site_tensor, take_biases
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

EPSILON = 1e-5
"""peft adds it to the rank it divides by."""

FIELDS = lora.SHARED_FIELDS | FieldTable(
    honoured=("init_r", "lora_alpha", "rank_pattern", "bias", *TARGET_FIELDS),
    ignored={
        "alpha_pattern": "AdaLoRA has one alpha",
        "beta1": "of the allocation of ranks during training",
        "beta2": "of the allocation of ranks during training",
        "deltaT": "of the allocation of ranks during training",
        "init_lora_weights": "AdaLoRA initialises in a way of its own",
        "lora_bias": "AdaLoRA's layers have none",
        "orth_reg_weight": "of the loss during training",
        "r": "AdaLoRA starts at init_r",
        "target_r": "the rank that training aimed at; rank_pattern says what came of it",
        "tfinal": "of the allocation of ranks during training",
        "tinit": "of the allocation of ranks during training",
        "total_step": "of the allocation of ranks during training",
        "use_rslora": "AdaLoRA divides by the rank",
        "ensure_weight_tying": "AdaLoRA ties nothing",
    },
    neutral={"trainable_token_indices": Neutral("trained token embeddings replace those of the base")},
)
"""Every field of peft 0.21.2's AdaLoraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The singular values are folded into A, the scale into B."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.ADALORA)
    init_r = config.integer("init_r", 12, low=1, high=lora.MAX_RANK)
    alpha = config.number("lora_alpha", 8)
    # The divisor is always the first rank: peft does not save how many singular values pruning left.
    scale = (alpha if alpha > 0 else init_r) / (init_r + EPSILON)
    kept = _kept_ranks(config)
    biases = take_biases(checkpoint, base, sites)
    forms: dict[str, SiteForms] = {}
    for site in sites:
        rank = kept.get(site.path, init_r)
        a = site_tensor(checkpoint, site, "lora_A", (rank, site.in_features))
        b = site_tensor(checkpoint, site, "lora_B", (site.out_features, rank))
        e = site_tensor(checkpoint, site, "lora_E", (rank, 1))
        if rank:
            forms[site.path] = SiteForms(LowRank(a * e, b * scale))
    return lora.with_biases(forms, biases, base)


def _kept_ranks(config: ConfigFields) -> Mapping[str, int]:
    """By path, how many singular values are left, from the masks that training ended with."""
    ranks = {}
    for name, mask in config.mapping("rank_pattern").items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            raise AdapterFormatError(
                f"rank_pattern[{show(name)}] must be a list of true and false, got {show(mask)}", param="rank_pattern"
            )
        ranks[name.removeprefix(PREFIX).removesuffix(".default").removesuffix(".lora_E")] = sum(mask)
    return ranks
