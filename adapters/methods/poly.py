"""Poly (arXiv 2202.13914) and its multi-head routing (arXiv 2211.03831): skills mixed by the task of the request.

y += x A B / r with A = Σ w_s A_s and B = Σ w_s B_s for each split of the input and of the output, and
w = σ(logits[task]) / Σ σ(logits[task]).
"""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.choices import Choice
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors
from weft.adapters.methods.common import method_sites, site_tensor

MAX_TASKS = 1 << 20
MAX_SKILLS = 1 << 16
EPS = 1e-12
"""peft's, below the sum of the weights."""

FIELDS = factors.PRODUCT_FIELDS | FieldTable(
    honoured=("r", "n_tasks", "n_skills", "n_splits", "poly_type", "target_modules", "exclude_modules"),
)
"""Every field of peft 0.21.2's PolyConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The skills are mixed here, for the chosen task."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "Poly")
    if config.value("poly_type", "poly") != "poly":
        kind = show(config.value("poly_type", "poly"))
        raise AdapterUnsupported(f"poly_type={kind} is not served, nor does peft have it", param="poly_type")
    rank = config.integer("r", 8, low=1, high=factors.MAX_RANK)
    tasks = config.integer("n_tasks", 1, low=1, high=MAX_TASKS)
    skills = config.integer("n_skills", 4, low=1, high=MAX_SKILLS)
    splits = config.integer("n_splits", 1, low=1, high=min(min(s.in_features, s.out_features) for s in sites))
    task = checkpoint.per_request.choose(Choice("task_id", 0, tasks - 1))
    forms = {}
    for site in sites:
        if site.in_features % splits or site.out_features % splits:
            raise AdapterFormatError(
                f"n_splits={splits} does not divide the widths of {site.path}, {site.in_features} in and "
                f"{site.out_features} out",
                param="n_splits",
            )
        logits = site_tensor(checkpoint, site, "poly_router.module_logits", (tasks, splits * skills))
        weights = logits[task].view(splits, skills).sigmoid()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
        forms[site.path] = _mixed(checkpoint, site, weights, rank)
    return forms


def _mixed(checkpoint: Checkpoint, site: Site, weights: torch.Tensor, rank: int) -> SiteForms:
    """Args: weights: ``[splits, skills]``."""
    splits, skills = weights.shape
    a = site_tensor(checkpoint, site, "poly_lora_A", (splits, skills, site.in_features // splits, rank))
    b = site_tensor(checkpoint, site, "poly_lora_B", (splits, skills, rank, site.out_features // splits))
    down = torch.einsum("qs,qsdr->qdr", weights, a).reshape(site.in_features, rank)
    up = torch.einsum("qs,qsrd->qdr", weights, b).reshape(site.out_features, rank)
    return factors.product(up / rank, down.T, site)
