"""LoRA (arXiv 2106.09685) as peft has it: y += s · (B (A x) + b) with s = α / r, or α / √r (rsLoRA); and DoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, as_integer, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.activated import invocation_tokens
from weft.adapters.methods.common import (
    COMMON_FIELDS,
    PREFIX,
    method_sites,
    take_biases,
)
from weft.adapters.methods.lora_factors import VARIANT_FIELDS, Factors, tensor_name
from weft.adapters.methods.parameters import (
    check_conversion,
    named_as,
    parameter_factors,
    targeted_parameters,
)
from weft.adapters.methods.targets import TARGET_FIELDS, match_patterns
from weft.adapters.methods.token_rows import take_trained_tokens, token_module
from weft.adapters.parts import LowRank

MAX_RANK = 1 << 14

SHARED_FIELDS = COMMON_FIELDS | FieldTable(
    ignored={
        "corda_config": "only read with init_lora_weights='corda', which is refused",
        "eva_config": "how A was initialised before training",
        "fan_in_fan_out": "peft corrects it to what the module is: true for Conv1D, false for Linear",
        "loftq_config": "only read with init_lora_weights='loftq', which is refused",
        "lora_dropout": "no dropout at inference",
        "lora_ga_config": "only read with init_lora_weights='lora_ga', which is refused",
        "megatron_core": "only read with megatron_config, which is refused",
        "qalora_group_size": "only read with use_qalora",
        "use_qalora": "peft pools the input of bases quantised by GPTQ alone, which are not served",
    },
    neutral={
        "alora_invocation_tokens": Neutral("an activated LoRA starts in the middle of the prompt"),
        "arrow_config": Neutral(
            "Arrow routes every token between several adapters: give the folder in which they lie beside arrow_router",
            chosen_by_object=True,
        ),
        "kasa_config": Neutral("KaSA removes singular values from the base weight"),
        "layer_replication": Neutral("it changes the depth of the base"),
        "megatron_config": Neutral("the adapter was trained on Megatron's own layers"),
        "monteclora_config": Neutral("MonteCLoRA's sampler is saved with the adapter"),
        "target_parameters": Neutral("it adapts parameters outside linear layers"),
        "use_bdlora": Neutral("BD-LoRA packs block-diagonal factors"),
        "use_dora": Neutral("DoRA rescales the output of every adapted layer"),
        "velora_config": Neutral("VeLoRA saves further tensors"),
    },
)
"""Fields of LoraConfig that mean the same to the methods that inherit it."""

_OWN_FIELDS = ("use_dora", "alora_invocation_tokens", "target_parameters")

FIELDS = SHARED_FIELDS.without(*_OWN_FIELDS, *VARIANT_FIELDS) | FieldTable(
    honoured=(
        *VARIANT_FIELDS,
        "r",
        "trainable_token_indices",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "bias",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "init_lora_weights",
        "ensure_weight_tying",
        "alora_invocation_tokens",
        "target_parameters",
        *TARGET_FIELDS,
    ),
)
"""Every field of peft 0.21.2's LoraConfig."""


@dataclass(frozen=True)
class Scaling:
    """Rank and scale of each site: ``r`` and ``lora_alpha`` with the exceptions of the patterns."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, config: ConfigFields, sites: Sequence[Site]) -> Scaling:
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


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. Every scale is folded into the factors."""
    config = checkpoint.config
    parameters_alone = bool(config.value("target_parameters", None))
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA, embeddings=True, optional=parameters_alone)
    check_conversion(config, base)
    factors = Factors.read(config, sites, base)
    _check_tying(config, sites, base)
    parameters = targeted_parameters(config, base, sites)
    checkpoint.per_request.invocation = invocation_tokens(config, sites, base)
    scaling = Scaling.read(config, [*sites, *(named_as(name, site) for name, site in parameters.items())])
    with_bias, dora = config.flag("lora_bias"), config.flag("use_dora")
    if with_bias and dora:
        raise AdapterUnsupported("lora_bias with use_dora is not defined, nor does peft make it", param="lora_bias")
    adapted = {name: _parameter_forms(checkpoint, parameters, name, scaling) for name in parameters}
    _check_names(checkpoint, sites, base)
    biases = take_biases(checkpoint, base, sites)
    forms = _trained_tokens(checkpoint, base)
    forms |= {parameters[name].path: form for name, form in adapted.items()}
    for site in sites:
        if site is base.embedding:
            forms[site.path] = _embedding_forms(checkpoint, base, site, *scaling.of(site), dora)
            continue
        rank, scale = scaling.of(site)
        shift = _bias(checkpoint, site) * scale if with_bias else None
        form = SiteForms(factors.take(checkpoint, base, site, rank, scale), shift=shift)
        if dora:
            form = _rescaled(form, _magnitude(checkpoint, site), base, site)
        forms[site.path] = form
    return with_biases(forms, biases, base)


def _bias(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    return checkpoint.tensors.take(tensor_name(checkpoint, site, "lora_B", "bias"), (site.out_features,)).float()


def _parameter_forms(checkpoint: Checkpoint, parameters: Mapping[str, Site], name: str, scaling: Scaling) -> SiteForms:
    site = parameters[name]
    rank, scale = scaling.of(named_as(name, site))
    factors = parameter_factors(checkpoint, list(parameters), name, site, rank)
    return SiteForms(replace(factors, b=factors.b * scale, scale=scale))


def _embedding_forms(checkpoint: Checkpoint, base: Base, site: Site, rank: int, scale: float, dora: bool) -> SiteForms:
    """A and B of the token embedding, whose input is one-hot; B is scaled as the module scales its own vectors."""
    a = checkpoint.tensors.take(tensor_name(checkpoint, site, "lora_embedding_A"), (rank, site.in_features)).float()
    b = (
        checkpoint.tensors.take(tensor_name(checkpoint, site, "lora_embedding_B"), (site.out_features, rank)).float()
        * scale
    )
    if not dora:
        return SiteForms(LowRank(a, b * base.embedding_scale, scale=scale * base.embedding_scale))
    if base.embedding_scale != 1.0:
        raise AdapterUnsupported("use_dora on an embedding that scales its vectors is not served", param="use_dora")
    gain = _magnitude(checkpoint, site) / (base.weight(site).T + b @ a).norm(dim=1)
    return SiteForms(LowRank(a, gain[:, None] * b), gain_out=gain)


def _trained_tokens(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """The rows of ``trainable_token_indices``: of the embedding, or by the name of the module."""
    value = checkpoint.config.value("trainable_token_indices", None)
    if not value:
        return {}
    assert base.embedding is not None, "every base has an embedding"
    by_name = value if isinstance(value, dict) else {base.embedding.path: value}
    tokens: dict[str, list[object]] = {}
    for name, ids in by_name.items():
        if not isinstance(ids, list):
            raise AdapterFormatError(
                f"trainable_token_indices must be a list of tokens, or one for each module, got {show(value)}",
                param="trainable_token_indices",
            )
        tokens[token_module(name, base, "trainable_token_indices")] = ids
    part = "token_adapter.trainable_tokens_delta"
    return take_trained_tokens(checkpoint, base, tokens, part, "trainable_token_indices")


def _magnitude(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """DoRA's trained norm of each output; older files call the module and not its tensor."""
    name = f"{PREFIX}{site.path}.lora_magnitude_vector"
    named = next((n for n in (name, f"{name}.weight", f"{name}.default.weight") if n in checkpoint.tensors), name)
    return checkpoint.tensors.take(named, (site.out_features,)).float()


def _rescaled(forms: SiteForms, magnitude: torch.Tensor, base: Base, site: Site) -> SiteForms:
    """DoRA (arXiv 2402.09353): y = g ⊙ ((W + s B A) x) + b0 with g = m / ‖W + s B A‖, by rows of the sum.

    g is the same for every input, so it is computed here, once: a gain of the base's output that spares its bias, and
    a factor of B.
    """
    assert forms.low_rank is not None
    low_rank = forms.low_rank
    gain = magnitude / (base.weight(site) + low_rank.b @ low_rank.a).norm(dim=1)
    bias = base.bias(site)
    shift = None if bias is None else bias - gain * bias
    return SiteForms(LowRank(low_rank.a, gain[:, None] * low_rank.b), gain_out=gain, shift=shift)


def with_biases(forms: Mapping[str, SiteForms], biases: Mapping[str, torch.Tensor], base: Base) -> dict[str, SiteForms]:
    """Forms whose output has the trained ``biases`` where it had the base's own."""
    result = dict(forms)
    for path, bias in biases.items():
        if path in base.norms:
            result[path] = SiteForms(bias=bias)
            continue
        form, site = result.get(path, SiteForms()), base.module(path)
        own = base.bias(site) if site is not None else None
        assert own is not None, "only biases of the base are trained"
        result[path] = replace(form, shift=bias - own if form.shift is None else bias - own + form.shift)
    return result


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
