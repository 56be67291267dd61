"""Arrow (arXiv 2405.11157): every row of a layer goes to the LoRA experts whose prototypes it is most alike.

What is served is the folder that ``save_pretrained`` writes of peft's ``create_arrow_model``: the folder of the router
and beside it those of its experts. A prototype is the first right singular vector of an expert's update B A, as peft
finds it: by power iteration from a random start. With ``use_gks`` (GenKnowSub) peft takes the mean A and the mean B of
the adapters of general knowledge from those of every expert when it first runs them, whenever the folder is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, as_integer, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, lora, lora_factors
from weft.adapters.methods.common import method_sites, site_tensor, take_base_copies
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import RoutedLowRank
from weft.kernels.routed_lora import MAX_EXPERTS

ITERATIONS = 15
EPSILON = 1e-8
GENERAL = "gks_"
"""Begins the names of adapters of general knowledge, which are no experts."""

FIELDS = lora.SHARED_FIELDS.without("arrow_config", "modules_to_save") | FieldTable(
    honoured=("arrow_config", "r", *TARGET_FIELDS),
    ignored={
        "alpha_pattern": "the router's own update is never applied",
        "ensure_weight_tying": "the router adapts linear layers alone",
        "lora_alpha": "the router's own update is never applied",
        "use_rslora": "the router's own update is never applied",
    },
    neutral={
        "bias": Neutral("the router of peft has no biases", ("none",)),
        "init_lora_weights": Neutral("the router would change the base", lora_factors.HARMLESS_INITS),
        "lora_bias": Neutral("the router of peft has no biases"),
        "modules_to_save": Neutral("the router of peft replaces no modules"),
        "rank_pattern": Neutral("the router has one rank"),
        "trainable_token_indices": Neutral("the router of peft replaces no embeddings"),
    },
)
"""Every field of peft 0.21.2's LoraConfig, as a router has it."""

ARROW_FIELDS = FieldTable(
    honoured=("top_k", "router_temperature", "rng_seed", "task_adapter_names", "use_gks", "gks_adapter_names")
)
"""Every field of peft 0.21.2's ArrowConfig."""


@dataclass(frozen=True)
class _Router:
    """How rows find their experts, their names, and those of the general knowledge to be taken from them."""

    experts: tuple[str, ...]
    general: tuple[str, ...]
    top_k: int
    temperature: float
    seed: int

    @classmethod
    def read(cls, config: ConfigFields, members: Mapping[str, Checkpoint]) -> _Router:
        fields = ConfigFields(config.mapping("arrow_config"))
        fields.check(ARROW_FIELDS)
        names = fields.names("task_adapter_names")
        experts = tuple(dict.fromkeys(names)) if isinstance(names, tuple) else ()
        beside = {name for name in members if not _is_general(name)}
        if set(experts) != beside or not 1 <= len(experts) <= MAX_EXPERTS:
            raise AdapterMismatch(
                f"arrow_config names the experts {show(names)}, 1 to {MAX_EXPERTS} of which must lie beside the "
                f"router, where there are {show(sorted(beside))}",
                param="task_adapter_names",
            )
        temperature = fields.number("router_temperature", 1.0)
        if temperature <= 0:
            raise AdapterFormatError("router_temperature must be above 0", param="router_temperature")
        seed = fields.value("rng_seed", None)
        if seed is None:
            raise AdapterUnsupported(
                "arrow_config has no rng_seed: peft then starts its search for prototypes at another place on every "
                "load, and no two loads need agree",
                param="rng_seed",
            )
        return cls(
            experts=experts,
            general=_general(fields, members),
            top_k=fields.integer("top_k", 3, low=1, high=len(experts)),
            temperature=temperature,
            seed=as_integer("rng_seed", seed, low=-(1 << 63), high=(1 << 63) - 1),
        )


def _general(fields: ConfigFields, members: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    names = fields.names("gks_adapter_names")
    if not fields.flag("use_gks"):
        return ()
    general = names if isinstance(names, tuple) else ()
    beside = sorted(name for name in members if _is_general(name))
    if not general or sorted(general) != beside:
        raise AdapterMismatch(
            f"use_gks is set and gks_adapter_names is {show(names)}; it must name those that lie beside the router, "
            f"{show(beside)}",
            param="gks_adapter_names",
        )
    return general


def _is_general(name: str) -> bool:
    return name.startswith(GENERAL) and name[len(GENERAL) :].isdigit()


@dataclass(frozen=True)
class _Expert:
    """The factors of one expert at one site, and what its update is scaled by."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    rank = config.integer("r", 8, low=1, high=lora.MAX_RANK)
    for site in sites:  # peft saves factors of the router as well, and never reads them
        site_tensor(checkpoint, site, "lora_A.weight", (rank, site.in_features))
        site_tensor(checkpoint, site, "lora_B.weight", (site.out_features, rank))
    router = _Router.read(config, checkpoint.members)
    experts, general = (
        [_experts(checkpoint.members[name], base, sites, name) for name in names]
        for names in (router.experts, router.general)
    )
    at = {site: ([e[site.path] for e in experts], [g[site.path] for g in general]) for site in sites}
    return {site.path: SiteForms(routed=_routed(*found, router, site)) for site, found in at.items()}


def _experts(member: Checkpoint, base: Base, sites: Sequence[Site], name: str) -> dict[str, _Expert]:
    """One member of the folder, by site."""
    if member.config.text("peft_type") != "LORA":
        raise AdapterUnsupported(f"the expert {name} must be a LoRA adapter", param="peft_type")
    forms = lora.compile_sites(member, base)
    take_base_copies(member, base)
    if member.per_request.invocation:
        raise AdapterUnsupported(
            f"the expert {name} is an activated LoRA; peft's router applies its experts to every token",
            param="alora_invocation_tokens",
        )
    if forms.keys() != {site.path for site in sites}:
        raise AdapterMismatch(
            f"the expert {name} does not adapt the same modules as the router, which peft cannot run",
            param="target_modules",
        )
    experts, scaling = {}, lora.Scaling.read(member.config, sites)
    for site in sites:
        form = forms[site.path]
        if form.low_rank is None or form.names != ("LowRank",):
            raise AdapterUnsupported(
                f"the expert {name} has more than the factors of LoRA at {show(site.path)}, and peft's router uses "
                "nothing else",
                param="arrow_config",
            )
        a = site_tensor(member, site, "lora_A.weight", (form.low_rank.rank, site.in_features))
        b = site_tensor(member, site, "lora_B.weight", (site.out_features, form.low_rank.rank))
        experts[site.path] = _Expert(a, b, scaling.of(site)[1])
    member.finish()
    return experts


def _prototype(a: torch.Tensor, b: torch.Tensor, seed: int) -> torch.Tensor:
    """``[in]``: B A's first right singular vector, as far as peft's iteration of ``A^T B^T B A`` comes."""
    gram = b.T @ b
    vector: torch.Tensor = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed))
    vector = vector / (vector.norm() + EPSILON)
    for _ in range(ITERATIONS):
        image = a.T @ (gram @ (a @ vector))
        vector = image / (image.norm() + EPSILON)
    return vector


def _routed(experts: Sequence[_Expert], general: Sequence[_Expert], router: _Router, site: Site) -> RoutedLowRank:
    if len({len(expert.a) for expert in (*experts, *general)}) > 1:
        raise AdapterMismatch(f"the experts have other ranks at {show(site.path)}, which peft cannot run", param="r")
    if general:
        a, b = (torch.stack([getattr(one, which) for one in general]).mean(0) for which in "ab")
        experts = [replace(expert, a=expert.a - a, b=expert.b - b) for expert in experts]
    prototypes = [_prototype(expert.a, expert.b, router.seed) for expert in experts]
    return RoutedLowRank(
        a=torch.cat([expert.a for expert in experts]),
        b=torch.cat([expert.b * expert.scale for expert in experts], dim=1),
        prototypes=torch.stack(prototypes) / router.temperature,
        top_k=router.top_k,
    )
