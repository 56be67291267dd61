"""TinyLoRA (arXiv 2602.04118): y += B R A x with R = Σ v_i P_i, where B A is W's largest part and v is all that learns.

The matrices P are random, of a seed of the site's own; groups of sites in a row share one v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import DECOMPOSED, method_sites, refuse_quantized, site_tensor, take_biases
from weft.adapters.methods.lora import MAX_RANK, with_biases
from weft.adapters.methods.places import TRANSPOSED_FIELDS
from weft.adapters.parts import LowRank

FIELDS = TRANSPOSED_FIELDS | FieldTable(
    honoured=(
        "r",
        "u",
        "weight_tying",
        "projection_seed",
        "save_projection",
        "bias",
        "layers_to_transform",
        "layers_pattern",
    ),
    ignored={
        "init_v_bound": "how v was initialised before training",
        "tinylora_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's TinyLoraConfig."""

MAX_VALUES = 1 << 28
"""Of all P of a site, where they are drawn."""


@dataclass(frozen=True)
class _Sizes:
    """Rank at most, length of v, how many sites share one, seed of the first site's P (None: P is saved)."""

    rank: int
    u: int
    groups: int
    group_size: int
    seed: int | None

    @classmethod
    def read(cls, config: ConfigFields, num_sites: int) -> _Sizes:
        tying = config.number("weight_tying", 0.0)
        if not 0 <= tying <= 1:
            raise AdapterFormatError(f"weight_tying must be from 0 to 1, got {tying}", param="weight_tying")
        groups = max(1, round(num_sites * (1 - tying)))
        seed = config.integer("projection_seed", 42, low=-(1 << 62), high=1 << 62)
        return cls(
            rank=config.integer("r", 2, low=1, high=MAX_RANK),
            u=config.integer("u", 64, low=1, high=1 << 31),
            groups=groups,
            group_size=max(1, num_sites // groups),
            seed=None if config.flag("save_projection", True) else seed,
        )

    def group(self, index: int) -> int:
        return min(index // self.group_size, self.groups - 1)


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. R is folded into B."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_quantized(sites, base, "TinyLoRA", DECOMPOSED)
    sizes = _Sizes.read(checkpoint.config, len(sites))
    groups = sorted({sizes.group(index) for index in range(len(sites))})
    vectors = {group: checkpoint.tensors.take(f"base_model.tinylora_v.{group}", (sizes.u,)) for group in groups}
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for index, site in enumerate(sites):
        rank = min(sizes.rank, site.in_features, site.out_features)
        a = site_tensor(checkpoint, site, "tinylora_A", (rank, site.in_features))
        b = site_tensor(checkpoint, site, "tinylora_B", (site.out_features, rank))
        projections = _projections(checkpoint, site, sizes, rank, index)
        mixed = torch.einsum("i,ijk->jk", vectors[sizes.group(index)].float(), projections)
        forms[site.path] = SiteForms(LowRank(a, b @ mixed))
    return with_biases(forms, biases, base)


def _projections(checkpoint: Checkpoint, site: Site, sizes: _Sizes, rank: int, index: int) -> torch.Tensor:
    """P, ``[u, rank, rank]``, of the site that is the ``index``-th of all."""
    shape = (sizes.u, rank, rank)
    if sizes.seed is None:
        return site_tensor(checkpoint, site, "tinylora_P", shape)
    if sizes.u * rank * rank > MAX_VALUES:
        raise AdapterUnsupported(f"u={sizes.u} matrices of rank {rank} are too many to draw", param="u")
    generator = torch.Generator().manual_seed(sizes.seed + index)
    return torch.normal(0.0, 1 / rank**0.5, shape, generator=generator)
