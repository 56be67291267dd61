"""FRoD (doi 10.1609/aaai.v40i31.39813): W' = U (S + diag λ) Vᵀ with W = U diag(λ0) Vᵀ, S sparse; S and λ are trained.

Modules of one role ("self_attn.q_proj") share V and the places of S. U follows from V and W. V is saved, or made again
from the weights of all layers as peft does it beside a model on the CPU: which of ±v it finds matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import (
    DECOMPOSED,
    check_dense,
    method_sites,
    refuse_quantized,
    site_tensor,
    take_biases,
)
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.places import SEEDS, TRANSPOSED_FIELDS

FIELDS = TRANSPOSED_FIELDS | FieldTable(
    honoured=(
        "projection_prng_key",
        "save_projection",
        "sparse_rate",
        "regularization_alpha",
        "bias",
        "layers_to_transform",
        "layers_pattern",
    ),
    ignored={
        "frod_dropout": "no dropout at inference",
        "progressbar": "shown while peft loads",
        "runtime_offload_base_weight": "where peft keeps the base's weight",
    },
)
"""Every field of peft 0.21.2's FrodConfig."""


@dataclass(frozen=True)
class _Shared:
    """What the modules of one role share: V ``[in, in]`` and the places of S, two rows of indices."""

    basis: torch.Tensor
    places: torch.Tensor


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.NARROW_PHI)
    refuse_quantized(sites, base, "FRoD", DECOMPOSED)
    check_dense(base, sites)
    rate = config.number("sparse_rate", 0.01)
    if not 0 <= rate <= 1:
        raise AdapterFormatError(f"sparse_rate must be from 0 to 1, got {rate}", param="sparse_rate")
    seed = config.integer("projection_prng_key", 0, **SEEDS)
    ridge = config.number("regularization_alpha", 1e-3)
    widths = _widths(sites)
    if config.flag("save_projection", True):
        shared = {role: _saved(checkpoint, role, width, rate) for role, width in widths.items()}
    else:
        bases = _bases(base, sites, ridge)
        places = _drawn_places(widths, rate, seed)
        shared = {role: _Shared(bases[role], places[role]) for role in widths}
    biases = take_biases(checkpoint, base, sites)
    forms = {site.path: _site_forms(checkpoint, base, site, shared[_role(site.path)]) for site in sites}
    return with_biases(forms, biases, base)


def _site_forms(checkpoint: Checkpoint, base: Base, site: Site, shared: _Shared) -> SiteForms:
    diagonal = site_tensor(checkpoint, site, "frod_lambda_l", (site.in_features,))
    values = site_tensor(checkpoint, site, "frod_lambda_s_values", (shared.places.shape[1],))
    weight = base.weight(site)
    middle = diagonal.diag().index_put((shared.places[0], shared.places[1]), values, accumulate=True)
    left = _left(weight, shared.basis).to(base.dtype).float()
    return SiteForms(delta=left @ middle @ shared.basis.T - weight)


def _left(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """U: W V⁻ᵀ with columns of length 1, fp32."""
    weight, basis = weight.double(), basis.double()
    try:
        left = torch.linalg.solve(basis, weight.T).T
    except RuntimeError:  # V is singular
        left = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
    length = left.norm(dim=0)
    left = torch.where(length > 1e-12, left / length, 0.0)
    return left.float()


def _saved(checkpoint: Checkpoint, role: str, width: int, rate: float) -> _Shared:
    basis = checkpoint.tensors.take(f"base_model.frod_V.{role}", (width, width)).float()
    name = f"base_model.frod_s_indices.{role}"
    places = checkpoint.tensors.take(name, (2, _num_places(width, rate)), integers=True)
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < width:
        raise AdapterFormatError(f"{show(name)} points outside a matrix of {width} by {width}", param=name[:200])
    name = f"base_model.frod_s_size.{role}"
    if checkpoint.tensors.take(name, (2,), integers=True).tolist() != [width, width]:
        raise AdapterFormatError(f"{show(name)} must be twice {width}", param=name[:200])
    return _Shared(basis, places)


def _num_places(width: int, rate: float) -> int:
    """Values of S: a share of those outside the diagonal, one at least unless the share is zero."""
    most = width * width - width
    return max(min(int(width * width * rate), most), 1 if rate > 0 and most else 0)


def _drawn_places(widths: Mapping[str, int], rate: float, seed: int) -> dict[str, torch.Tensor]:
    """The places of S of every role: drawn one role after another, by name."""
    generator = torch.Generator().manual_seed(seed)
    places = {}
    for role in sorted(widths):
        width, count = widths[role], _num_places(widths[role], rate)
        if not count:
            places[role] = torch.empty(2, 0, dtype=torch.long)
            continue
        drawn = torch.randperm(width * width - width, generator=generator)[:count]
        # The n-th place outside the diagonal: each row has one less than the matrix is wide.
        rows, columns = drawn // (width - 1), drawn % (width - 1)
        places[role] = torch.stack([rows, columns + (columns >= rows)])
    return places


def _bases(base: Base, sites: Sequence[Site], ridge: float) -> dict[str, torch.Tensor]:
    """V of every role, from the weights of its sites by layer; of several in one layer peft takes the last."""
    layers: dict[int, dict[str, Site]] = {}
    for index, site in enumerate(sites):
        layers.setdefault(_layer(site.path, index), {})[_role(site.path)] = site
    bases = {}
    for role in {_role(site.path) for site in sites}:
        weights = [base.weight(layer[role]) for _, layer in sorted(layers.items()) if role in layer]
        bases[role] = _basis(weights, ridge).to(base.dtype).float()
    return bases


def _basis(weights: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """V ``[in, in]`` of some weights ``[out, in]``: a higher-order generalised singular value decomposition."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        right: torch.Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh
        return right.T
    basis, triangle = torch.linalg.qr(stacked)
    one = torch.eye(stacked.shape[1])
    parts = basis.split([len(weight) for weight in weights])
    total = torch.zeros_like(one)
    for part in parts:
        total += torch.linalg.inv(part.T @ part + ridge * one)
    vectors: torch.Tensor = triangle.T @ torch.linalg.eigh(total / len(parts)).eigenvectors
    return vectors


def _widths(sites: Sequence[Site]) -> dict[str, int]:
    widths: dict[str, int] = {}
    for site in sites:
        role = _role(site.path)
        if widths.setdefault(role, site.in_features) != site.in_features:
            raise AdapterUnsupported(
                f"target_modules selects modules of different width for {show(role)}, which must share a basis",
                param="target_modules",
            )
    return widths


def _role(path: str) -> str:
    """peft's name for the modules that share a basis: the last two names of the path, or one after a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])


def _layer(path: str, default: int) -> int:
    """The number after ``layers`` in the path, else the first number of all, else ``default``."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), default)
