"""LoRA (arXiv 2106.09685) as peft has it: y += s · (B (A x) + b) with s = α / r, or α / √r (rsLoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, as_integer, as_number, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import LowRank, SiteForms
from weft.adapters.methods.common import COMMON_FIELDS, PREFIX, cast_finite, check_task, take_base_copies
from weft.adapters.methods.targets import TARGET_FIELDS, match_patterns, targeted_sites

MAX_RANK = 1 << 14

DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gpt2": ("c_attn",),
        "bloom": ("query_key_value",),
        "opt": ("q_proj", "v_proj"),
        "gptj": ("q_proj", "v_proj"),
        "gpt_neox": ("query_key_value",),
        "gpt_neo": ("q_proj", "v_proj"),
        "llama": ("q_proj", "v_proj"),
        "gpt_bigcode": ("c_attn",),
        "mpt": ("Wqkv",),
        "falcon": ("query_key_value",),
        "codegen": ("qkv_proj",),
        "mistral": ("q_proj", "v_proj"),
        "mixtral": ("q_proj", "v_proj"),
        "stablelm": ("q_proj", "v_proj"),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "gemma": ("q_proj", "v_proj"),
        "gemma2": ("q_proj", "v_proj"),
        "gemma3_text": ("q_proj", "v_proj"),
        "qwen2": ("q_proj", "v_proj"),
        "qwen3": ("q_proj", "v_proj"),
    }
)
"""peft's TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, of causal language models."""

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights as they are."""

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "init_lora_weights",
        "ensure_weight_tying",
        *TARGET_FIELDS,
    ),
    ignored={
        "corda_config": "only read with init_lora_weights='corda', which is refused",
        "eva_config": "how A was initialised before training",
        "fan_in_fan_out": "peft corrects it to what the module is: true for Conv1D, false for Linear",
        "loftq_config": "only read with init_lora_weights='loftq', which is refused",
        "lora_dropout": "no dropout at inference",
        "lora_ga_config": "only read with init_lora_weights='lora_ga', which is refused",
        "megatron_core": "only read with megatron_config, which is refused",
        "qalora_group_size": "only read with use_qalora, which is refused",
    },
    neutral={
        "alora_invocation_tokens": Neutral("an activated LoRA starts in the middle of the prompt"),
        "arrow_config": Neutral("Arrow routes every token between several adapters"),
        "bias": Neutral("trained biases replace those of the base", also=("none",)),
        "kasa_config": Neutral("KaSA removes singular values from the base weight"),
        "layer_replication": Neutral("it changes the depth of the base"),
        "megatron_config": Neutral("the adapter was trained on Megatron's own layers"),
        "modules_to_save": Neutral("fully trained modules replace those of the base"),
        "monteclora_config": Neutral("MonteCLoRA's sampler is saved with the adapter"),
        "target_parameters": Neutral("it adapts parameters outside linear layers"),
        "trainable_token_indices": Neutral("trained token embeddings replace those of the base"),
        "use_bdlora": Neutral("BD-LoRA packs block-diagonal factors"),
        "use_dora": Neutral("DoRA rescales the output of every adapted layer"),
        "use_qalora": Neutral("QA-LoRA pools the input in groups"),
        "velora_config": Neutral("VeLoRA saves further tensors"),
    },
)
"""Every field of peft 0.21.2's LoraConfig."""


@dataclass(frozen=True)
class _Scaling:
    """Rank and scale of each site: ``r`` and ``lora_alpha`` with the exceptions of the patterns."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, config: ConfigFields, sites: Sequence[Site]) -> _Scaling:
        ranks = match_patterns(config.mapping("rank_pattern"), sites, "rank_pattern")
        alphas = match_patterns(config.mapping("alpha_pattern"), sites, "alpha_pattern")
        return cls(
            rank=config.integer("r", 8, low=1, high=MAX_RANK),
            alpha=config.number("lora_alpha", 8),
            rslora=config.flag("use_rslora"),
            ranks={path: as_integer("rank_pattern", r, low=1, high=MAX_RANK) for path, r in ranks.items()},
            alphas={path: as_number("alpha_pattern", alpha) for path, alpha in alphas.items()},
        )

    def of(self, site: Site) -> tuple[int, float]:
        rank = self.ranks.get(site.path, self.rank)
        alpha = self.alphas.get(site.path, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def compile_sites(checkpoint: Checkpoint, base: Base, dtype: torch.dtype) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The scale is folded into B (and b) in fp32, then both are cast once."""
    config = checkpoint.config
    check_task(config)
    config.check(FIELDS)
    _check_init(config)
    sites = targeted_sites(config, base, DEFAULT_TARGETS)
    _check_tying(config, sites, base)
    scaling = _Scaling.read(config, sites)
    with_bias = config.flag("lora_bias")
    _check_names(checkpoint, sites, base)
    forms = {site.path: _site_forms(checkpoint, site, *scaling.of(site), with_bias, dtype) for site in sites}
    take_base_copies(checkpoint, base)
    checkpoint.finish()
    return forms


def _site_forms(
    checkpoint: Checkpoint, site: Site, rank: int, scale: float, with_bias: bool, dtype: torch.dtype
) -> SiteForms:
    a_name, b_name = (_name(checkpoint, site, part, "weight") for part in ("lora_A", "lora_B"))
    a = checkpoint.tensors.take(a_name, (rank, site.in_features))
    b = checkpoint.tensors.take(b_name, (site.out_features, rank))
    bias = None
    if with_bias:
        bias_name = _name(checkpoint, site, "lora_B", "bias")
        bias = checkpoint.tensors.take(bias_name, (site.out_features,))
        bias = cast_finite(bias.float() * scale, dtype, bias_name)
    low_rank = LowRank(cast_finite(a, dtype, a_name), cast_finite(b.float() * scale, dtype, b_name))
    return SiteForms(low_rank=low_rank, bias=bias)


def _name(checkpoint: Checkpoint, site: Site, part: str, kind: str) -> str:
    """The tensor's name. A state dict saved without peft's help keeps the adapter's name, by default ``default``."""
    name = f"{PREFIX}{site.path}.{part}.{kind}"
    named = f"{PREFIX}{site.path}.{part}.default.{kind}"
    return named if named in checkpoint.tensors and name not in checkpoint.tensors else name


def _check_init(config: ConfigFields) -> None:
    init = config.value("init_lora_weights", True)
    if any(type(init) is type(value) and init == value for value in HARMLESS_INITS):
        return
    raise AdapterUnsupported(
        f"init_lora_weights={show(init)} is not served: the adapter belongs to base weights that were changed before "
        "training; save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        param="init_lora_weights",
    )


def _check_tying(config: ConfigFields, sites: Sequence[Site], base: Base) -> None:
    if config.flag("ensure_weight_tying") and any(site.path == base.head for site in sites):
        raise AdapterUnsupported(
            "ensure_weight_tying is not served where the head is adapted: it ties its adapter to the embedding's",
            param="ensure_weight_tying",
        )


def _check_names(checkpoint: Checkpoint, sites: Sequence[Site], base: Base) -> None:
    """Say why a LoRA tensor has no place, better than that it was left over."""
    targeted, modules = {site.path for site in sites}, set(base.module_paths)
    for name in checkpoint.tensors.left:
        path, found, _ = name.removeprefix(PREFIX).rpartition(".lora_")
        if not found or not name.startswith(PREFIX) or path in targeted:
            continue
        why = "the config does not target it" if path in modules else f"this {base.model_type} model has none"
        raise AdapterMismatch(f"{show(name)} adapts the module {show(path)}, but {why}", param=name[:200])
