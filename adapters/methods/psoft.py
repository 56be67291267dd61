"""PSOFT (arXiv 2505.11235): y += B (R − 1) A x, where B A is the largest part of W's singular value decomposition.

R = diag(b) Q diag(a) is what learns, Q orthogonal (Cayley's transform, exact or as a series) or free. A and B are not
saved. Which of ±u, ±v the decomposition finds matters, so it is done as peft does it beside a model on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, as_number, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.cayley import cayley, cayley_series, skew_symmetric
from weft.adapters.methods.common import DECOMPOSED, check_memory, method_sites, refuse_quantized, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.places import LINEAR_FIELDS, SEEDS
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

FIELDS = LINEAR_FIELDS | FieldTable(
    honoured=(
        "r",
        "psoft_alpha",
        "ab_svd_init",
        "psoft_svd",
        "psoft_svd_lowrank_niter",
        "random_seed",
        "psoft_orth",
        "psoft_mag_a",
        "psoft_mag_b",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "cayley_neumann_eps",
        *TARGET_FIELDS,
    ),
    ignored={
        "fan_in_fan_out": "peft adapts no Conv1D with PSOFT",
        "psoft_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's PsoftConfig."""


@dataclass(frozen=True)
class _Rotation:
    """How R follows from what is saved. ``terms`` of the series, or None for the exact transform."""

    orthogonal: bool
    scales_input: bool
    scales_output: bool
    terms: int | None
    largest: float | None

    @classmethod
    def read(cls, config: ConfigFields) -> _Rotation:
        terms = config.integer("num_cayley_neumann_terms", 5, low=1, high=100)
        given = config.value("cayley_neumann_eps", None)
        largest = None if given is None else as_number("cayley_neumann_eps", given)
        series = config.flag("use_cayley_neumann")
        if series and largest is not None and not 0 < largest < 1:
            raise AdapterFormatError(f"cayley_neumann_eps must be in (0, 1), got {largest}", param="cayley_neumann_eps")
        return cls(
            orthogonal=config.flag("psoft_orth", True),
            scales_input=config.flag("psoft_mag_a", True),
            scales_output=config.flag("psoft_mag_b", True),
            terms=terms if series else None,
            largest=largest,
        )

    def matrix(self, checkpoint: Checkpoint, site: Site, r: int) -> torch.Tensor:
        """R, ``[r, r]``."""
        if self.orthogonal:
            upper = site_tensor(checkpoint, site, "psoft_R.weight", (r * (r - 1) // 2,))
            matrix = self._cayley(skew_symmetric(upper, r))
        else:
            matrix = site_tensor(checkpoint, site, "psoft_R.weight", (r, r))
        if self.scales_output:
            matrix = site_tensor(checkpoint, site, "psoft_R.vector_b", (r,))[:, None] * matrix
        if self.scales_input:
            matrix = matrix * site_tensor(checkpoint, site, "psoft_R.vector_a", (r,))
        return matrix

    def _cayley(self, skew: torch.Tensor) -> torch.Tensor:
        """(1 + Q) (1 − Q)⁻¹, or its series."""
        if self.terms is None:
            return cayley(-skew)
        norm = skew.norm()
        if self.largest is not None and norm > self.largest:
            skew = skew * (self.largest / (norm + 1e-12))
        return cayley_series(skew, self.terms)


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. R − 1 is folded into B; α / r is part of peft's B and of its scale, and cancels."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_quantized(sites, base, "PSOFT", DECOMPOSED)
    refuse_conv1d(sites, "PSOFT")
    rank = config.integer("r", 32, low=1, high=min(min(site.in_features, site.out_features) for site in sites))
    check_memory(base, rank * sum(site.in_features + site.out_features for site in sites))
    if config.number("psoft_alpha", 32) <= 0:
        raise AdapterFormatError("psoft_alpha must be positive", param="psoft_alpha")
    symmetric = _choice(config, "ab_svd_init", ("psoft_init", "pissa_init")) == "pissa_init"
    exact = _choice(config, "psoft_svd", ("full", "lowrank")) == "full"
    iterations = config.integer("psoft_svd_lowrank_niter", 10, low=0, high=1000)
    seed = config.integer("random_seed", 0, **SEEDS)
    rotation = _Rotation.read(config)
    forms = {}
    for site in sites:
        matrix = rotation.matrix(checkpoint, site, rank)
        weight = base.weight(site)
        left, values, right = _svd(weight, rank) if exact else sketched_svd(weight, rank, iterations, seed)
        if symmetric:
            roots = values.sqrt()
            left, right = left * roots, roots[:, None] * right
        else:
            left = left * values
        forms[site.path] = SiteForms(LowRank(right, left @ (matrix - torch.eye(rank))))
    return forms


def _svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values with their vectors: ``[out, rank]``, ``[rank]``, ``[rank, in]``."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def sketched_svd(
    weight: torch.Tensor, rank: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Likewise, by subspace iteration from a random start (Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1).

    The numbers of ``torch.svd_lowrank``, which draws them from the process's generator.
    """
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.T if wide else weight
    start = torch.randn(tall.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    left = basis @ left
    return (right.T, values, left.T) if wide else (left, values, right)


def _choice(config: ConfigFields, name: str, choices: tuple[str, str]) -> str:
    """One of ``choices``, of which the first is the default."""
    value = config.text(name) or choices[0]
    if value not in choices:
        raise AdapterFormatError(f"{name} must be {choices[0]} or {choices[1]}, got {show(value)}", param=name)
    return value
