"""LoRA on parameters that peft's ``target_parameters`` names: linears, routers, and the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import conversion_mapping

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods.common import PREFIX
from weft.adapters.methods.lora_factors import RESIDUAL_INITS, VARIANT_FIELDS
from weft.adapters.parts import LowRank
from weft.adapters.patterns import first_matches, is_plain

FUSED = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Linears of transformers 4 that version 5 made parameters, by family: peft 0.21 turns targets of such a name into
``target_parameters`` (``peft.utils.transformers_weight_conversion``)."""


def targeted_parameters(config: ConfigFields, base: Base, modules: Sequence[Site]) -> dict[str, Site]:
    """The sites of ``target_parameters`` by the parameter's name, in the base's order.

    peft looks at the end of the name alone: ``exclude_modules`` and ``layers_to_transform`` do not count here.

    Args:
        modules: the sites that ``target_modules`` selected.

    Raises:
        AdapterMismatch: a name selects no parameter.
        AdapterUnsupported: a parameter is of a kind that is not served, or its module is adapted as well, or an option
            is set with which peft refuses parameters.
    """
    names = config.names("target_parameters")
    if isinstance(names, str):
        raise AdapterFormatError("target_parameters must be a list of names", param="target_parameters")
    if not names:
        return {}
    _check_options(config)
    chosen: dict[str, Site] = {}
    unused = set(names)
    for name in base.parameters:
        hits = {key for key in names if name == key or name.endswith(f".{key}")}
        if hits:
            unused -= hits
            chosen[name] = _site(name, base)
    if unused:
        raise AdapterMismatch(
            f"target_parameters names {show(min(unused))}, which is no parameter of this {base.model_type} model",
            param="target_parameters",
        )
    both = {site.path for site in modules}.intersection(site.path for site in chosen.values())
    if both:
        raise AdapterUnsupported(
            f"target_parameters names the weight of {show(min(both))}, which target_modules adapts as well",
            param="target_parameters",
        )
    return chosen


def _check_options(config: ConfigFields) -> None:
    options = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "alora_invocation_tokens", *VARIANT_FIELDS)
    for name in options:
        if config.value(name, None):
            raise AdapterUnsupported(
                f"{name} is set beside target_parameters; peft refuses that, so there is nothing to be equal to",
                param=name,
            )
    init = config.value("init_lora_weights", True)
    if init in RESIDUAL_INITS:
        raise AdapterUnsupported(
            f"init_lora_weights={show(init)} is not served beside target_parameters: what it took from the base's "
            "parameters is not recomputed; save the adapter with path_initial_model_for_weight_conversion",
            param="init_lora_weights",
        )


def _site(name: str, base: Base) -> Site:
    path = name.removesuffix(".weight")
    site = base.parameter_sites.get(path) or (base.sites.get(path) if path != name else None)
    if site is None:
        raise AdapterUnsupported(
            f"target_parameters names {show(name)}; only weights of linear layers, routers and experts are served",
            param="target_parameters",
        )
    if site.experts == 1 and site.transposed:
        raise AdapterUnsupported(
            f"{show(name)} holds a single expert, transposed; peft gives its update the wrong shape",
            param="target_parameters",
        )
    return site


def parameter_factors(checkpoint: Checkpoint, chosen: Sequence[str], name: str, site: Site, rank: int) -> LowRank:
    """The factors of a parameter, unscaled.

    peft wraps a module once for each of its parameters, in the order of their registration, so the last one has the
    module's own name and every other one ``base_layer`` once more. It lays factors of experts down as A
    ``[experts * r, in]``, those of an expert together, but B ``[out, r * experts]``, those of a rank together.

    Args:
        chosen: names of all targeted parameters, in the base's order.

    Raises:
        AdapterMismatch: a tensor is missing, or of another shape.
    """
    module = name.rpartition(".")[0]
    siblings = [other for other in chosen if other.rpartition(".")[0] == module]
    path = module + ".base_layer" * (len(siblings) - 1 - siblings.index(name))
    count = max(1, site.experts)
    # peft reads a Conv1D's weight as [out, in], though it is [in, out]: A and B change places.
    swapped = site.kind == "conv1d"
    inputs, outputs = (site.out_features, site.in_features) if swapped else (site.in_features, site.out_features)
    a = checkpoint.tensors.take(f"{PREFIX}{path}.lora_A.weight", (rank * count, inputs)).float()
    b = checkpoint.tensors.take(f"{PREFIX}{path}.lora_B.weight", (outputs, rank * count)).float()
    if swapped:
        return LowRank(b.T, a.T)
    return LowRank(a, b.view(outputs, rank, count).transpose(1, 2).reshape(outputs, count * rank), experts=count)


def named_as(name: str, site: Site) -> Site:
    """The site under the parameter's name, which the keys of ``rank_pattern`` are compared with."""
    return Site(name, site.kind, site.in_features, site.out_features, site.has_bias)


def check_conversion(config: ConfigFields, base: Base) -> None:
    """Refuse targets that peft rewrites when it loads the adapter, because transformers 5 fused what they name.

    Raises:
        AdapterUnsupported: saying which, and the way out.
    """
    family = _family(base.model_type)
    targets = config.names("target_modules")
    if family is None or not targets:
        return
    fused = FUSED[family]
    if isinstance(targets, str):
        # peft puts the last names of what the expression matches in its place, and adds what was fused.
        paths = [path for path in base.module_paths if path]
        paths += [f"{path}.{name}" for path in paths for name in sorted(fused)]
        hits = first_matches([targets], paths, param="target_modules", full=True, plain=is_plain(targets))
        matched = [path for path, hit in zip(paths, hits, strict=True) if hit is not None]
        leaves = {path.rpartition(".")[2] for path in matched}
        widened = {path for path in base.module_paths if path.rpartition(".")[2] in leaves} - set(matched)
        if not widened and not leaves & fused and targets.lower() != "all-linear":
            return
        what = f"target_modules={show(targets)}"
    else:
        named = sorted(target for target in targets if target.rpartition(".")[2] in fused)
        if not named:
            return
        what = f"target_modules names {show(named[0])}"
    raise AdapterUnsupported(
        f"{what}, which peft rewrites for {base.model_type}: transformers 5 made parameters of the experts' linears "
        "and of the router; load it with peft 0.21 and save it again, so that its config has target_parameters",
        param="target_modules",
    )


def _family(model_type: str) -> str | None:
    patterns = {**conversion_mapping._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    family: str | None = patterns.get(model_type)
    return family if family in FUSED else None
