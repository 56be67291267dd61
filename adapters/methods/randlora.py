"""RandLoRA (arXiv 2502.00987) as peft has it: W += α / r · Σ_j B_j Λ_j A Γ_j of full rank, with A and all B_j random
and shared by all sites, Λ_j and Γ_j diagonal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import PREFIX, check_dense, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases

FIELDS = (
    factors.PRODUCT_FIELDS
    | factors.FAN_FIELD
    | FieldTable(
        honoured=(
            "r",
            "randlora_alpha",
            "bias",
            "projection_prng_key",
            "save_projection",
            "sparse",
            "very_sparse",
            "target_modules",
            "layers_to_transform",
            "layers_pattern",
        ),
        ignored={"randlora_dropout": "no dropout at inference"},
    )
)
"""Every field of peft 0.21.2's RandLoraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. Factors of full rank take more than the update itself: it is kept dense."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    check_dense(base, sites)
    rank = config.integer("r", 32, low=1, high=factors.MAX_RANK)
    scale = config.number("randlora_alpha", 640) / rank
    biases = take_biases(checkpoint, base, sites)
    shared_a, shared_b = _projections(checkpoint, base, sites, rank)
    forms = {}
    for site in sites:
        narrow, wide = sorted((site.in_features, site.out_features))
        count = math.ceil(narrow / rank)
        lambdas = site_tensor(checkpoint, site, "randlora_lambda", (rank, count))
        gammas = site_tensor(checkpoint, site, "randlora_gamma", (count, narrow))
        a = (lambdas[:, :, None] * shared_a[:, :, :narrow] * gammas).flatten(end_dim=1)
        # The factors are flattened in unlike orders, r first here and last there: so peft does, in training as well.
        b = shared_b[:wide, :count].flatten(start_dim=1)
        delta = scale * (b @ a)
        forms[site.path] = SiteForms(delta=delta if site.in_features == narrow else delta.T)
    return with_biases(forms, biases, base)


def _projections(
    checkpoint: Checkpoint, base: Base, sites: Sequence[Site], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, 1, narrow]`` and B ``[wide, bases, r]``, as large as any site needs: from the file, or drawn again."""
    config = checkpoint.config
    narrow, wide = sorted((max(site.in_features for site in sites), max(site.out_features for site in sites)))
    shape_a, shape_b = (rank, 1, narrow), (wide, math.ceil(narrow / rank), rank)
    generator = factors.projection_generator(config)
    sparse, very_sparse = config.flag("sparse"), config.flag("very_sparse")
    if config.flag("save_projection", True):
        a, b = (_saved(checkpoint, sites, f"randlora_{letter}", s) for letter, s in (("A", shape_a), ("B", shape_b)))
        return a.float(), b.float()
    factors.check_projection(shape_b[1] * rank, wide)
    if very_sparse or sparse:
        odds = 2 * (math.sqrt(narrow) if very_sparse else 3)
        drawn = [_ternary(shape, odds, generator) for shape in (shape_a, shape_b)]
    else:
        drawn = [_uniform(shape_a, generator)]
        drawn.append(torch.cat([_uniform((wide, 1, rank), generator) for _ in range(shape_b[1])], dim=1))
    # peft moves them to the dtype of the base's weights before it computes in fp32.
    a, b = ((projection / projection.std()).to(base.dtype).float() for projection in drawn)
    return a, b


def _saved(checkpoint: Checkpoint, sites: Sequence[Site], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The shared projection; peft saves a copy of it with every site besides.

    Raises:
        AdapterMismatch: a copy is not one.
    """
    shared = checkpoint.tensors.take(f"base_model.{name}", shape)
    for site in sites:
        copy = f"{PREFIX}{site.path}.{name}"
        if copy in checkpoint.tensors and not torch.equal(checkpoint.tensors.take(copy, shape), shared):
            raise AdapterMismatch(f"{show(copy)} is not a copy of base_model.{name}", param=copy[:200])
    return shared


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Drawn in bfloat16 as by peft, save on machines whose accelerator has only fp16."""
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _ternary(shape: tuple[int, ...], odds: float, generator: torch.Generator) -> torch.Tensor:
    """-1 and 1 with a probability of 1 / ``odds`` each, else 0."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float32)
    return (draws > 1 - 1 / odds).float() - (draws < 1 / odds).float()
