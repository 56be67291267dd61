"""Arrow (arXiv 2405.11157): every row of a layer goes to the LoRA experts whose prototypes it is most alike.

What is served is the folder that ``save_pretrained`` writes of peft's ``create_arrow_model``: the folder of the router
and beside it those of its experts. A prototype is the first right singular vector of an expert's update B A, as peft
finds it: by power iteration from a random start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, as_integer, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, lora, lora_factors
from weft.adapters.methods.common import method_sites, site_tensor, take_base_copies
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank, RoutedLowRank
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
    honoured=("top_k", "router_temperature", "rng_seed", "task_adapter_names"),
    ignored={"gks_adapter_names": "only read with use_gks, which is refused"},
    neutral={
        "use_gks": Neutral(
            "peft subtracts the general knowledge from the experts when it first runs them, and then saves them so, "
            "but the folder does not tell; run the model once, save it, and set use_gks to false"
        )
    },
)
"""Every field of peft 0.21.2's ArrowConfig."""


@dataclass(frozen=True)
class _Router:
    """How rows find their experts, and the experts' names."""

    experts: tuple[str, ...]
    top_k: int
    temperature: float
    seed: int

    @classmethod
    def read(cls, config: ConfigFields, members: Mapping[str, Checkpoint]) -> _Router:
        fields = ConfigFields(config.mapping("arrow_config"))
        fields.check(ARROW_FIELDS)
        names = fields.names("task_adapter_names")
        experts = tuple(dict.fromkeys(names)) if isinstance(names, tuple) else ()
        beside = {name for name in members if not (name.startswith(GENERAL) and name[len(GENERAL) :].isdigit())}
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
            top_k=fields.integer("top_k", 3, low=1, high=len(experts)),
            temperature=temperature,
            seed=as_integer("rng_seed", seed, low=-(1 << 63), high=(1 << 63) - 1),
        )


@dataclass(frozen=True)
class _Expert:
    """One expert at one site: its update, and ``[in]``, what it is for."""

    update: LowRank
    prototype: torch.Tensor


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    rank = config.integer("r", 8, low=1, high=lora.MAX_RANK)
    for site in sites:  # peft saves factors of the router as well, and never reads them
        site_tensor(checkpoint, site, "lora_A.weight", (rank, site.in_features))
        site_tensor(checkpoint, site, "lora_B.weight", (site.out_features, rank))
    router = _Router.read(config, checkpoint.members)
    experts = [_experts(checkpoint.members[name], base, sites, name, router.seed) for name in router.experts]
    return {site.path: SiteForms(routed=_routed([e[site.path] for e in experts], router, site)) for site in sites}


def _experts(member: Checkpoint, base: Base, sites: Sequence[Site], name: str, seed: int) -> dict[str, _Expert]:
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
    experts = {}
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
        experts[site.path] = _Expert(form.low_rank, _prototype(a, b, seed))
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


def _routed(experts: Sequence[_Expert], router: _Router, site: Site) -> RoutedLowRank:
    if len({expert.update.rank for expert in experts}) > 1:
        raise AdapterMismatch(f"the experts have other ranks at {show(site.path)}, which peft cannot run", param="r")
    return RoutedLowRank(
        a=torch.cat([expert.update.a for expert in experts]),
        b=torch.cat([expert.update.b for expert in experts], dim=1),
        prototypes=torch.stack([expert.prototype for expert in experts]) / router.temperature,
        top_k=router.top_k,
    )
