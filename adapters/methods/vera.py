"""VeRA (arXiv 2310.11454) as peft has it: y += λb ⊙ (B (λd ⊙ (A x))); all sites share A and B, which are random.

PVeRA is the same once trained: the mean of what it draws while training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import check_memory, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import with_biases

SHARED_FIELDS = (
    factors.PRODUCT_FIELDS
    | factors.FAN_FIELD
    | FieldTable(
        honoured=(
            "r",
            "bias",
            "projection_prng_key",
            "save_projection",
            "target_modules",
            "layers_to_transform",
            "layers_pattern",
        ),
        ignored={"d_initial": "what λd was before training"},
    )
)

FIELDS = SHARED_FIELDS | FieldTable(ignored={"vera_dropout": "no dropout at inference"})
"""Every field of peft 0.21.2's VeraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    return compile_shared(checkpoint, base, FIELDS, "vera", parts=1)


def compile_shared(
    checkpoint: Checkpoint, base: Base, fields: FieldTable, name: str, *, parts: int
) -> dict[str, SiteForms]:
    """The sites of a method with projections that all of them share.

    Args:
        fields: every field of its config.
        name: what its tensors' names begin with.
        parts: how many times ``r`` the rows of A and λd are; the first ``r`` count.
    """
    sites = method_sites(checkpoint, base, fields, defaults.NARROW_PHI)
    rank = checkpoint.config.integer("r", 256, low=1, high=factors.MAX_RANK)
    check_memory(base, sum(factors.numbers(rank, site) for site in sites))
    biases = take_biases(checkpoint, base, sites)
    shared_a, shared_b = _projections(checkpoint, base, sites, name, rank, parts * rank)
    forms: Mapping[str, SiteForms] = {
        site.path: factors.product(
            site_tensor(checkpoint, site, f"{name}_lambda_b", (site.out_features,))[:, None]
            * shared_b[: site.out_features],
            site_tensor(checkpoint, site, f"{name}_lambda_d", (parts * rank,))[:rank, None]
            * shared_a[:rank, : site.in_features],
            site,
        )
        for site in sites
    }
    return with_biases(forms, biases, base)


def _projections(
    checkpoint: Checkpoint, base: Base, sites: Sequence[Site], name: str, rank: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, as wide as the widest site: from the file, or drawn again as peft drew them."""
    shape_a = (rows, max(site.in_features for site in sites))
    shape_b = (max(site.out_features for site in sites), rank)
    generator = factors.projection_generator(checkpoint.config)
    if checkpoint.config.flag("save_projection", True):
        a = checkpoint.tensors.take(f"base_model.{name}_A", shape_a)
        return a.float(), checkpoint.tensors.take(f"base_model.{name}_B", shape_b).float()
    factors.check_projection(rows, max(shape_a[1], shape_b[0]))
    drawn = [
        torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32), generator=generator)
        for shape in (shape_a, shape_b)
    ]
    # peft moves them to the dtype of the base's weights before it computes in fp32.
    a, b = (projection.to(base.dtype).float() for projection in drawn)
    return a, b
