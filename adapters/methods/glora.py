"""GLoRA (arXiv 2306.07967): W' = W + W ⊙ A + B and b' = b + b ⊙ D + E + W C, the last three if the base has a bias.

A and B are low-rank, a value for each output, or one value; C is a vector, low-rank or not; D and E are vectors or one
value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import PREFIX, check_dense, method_sites, site_tensor, take_biases
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import MAX_RANK, with_biases
from weft.adapters.methods.places import LINEAR_FIELDS
from weft.adapters.parts import LowRank

FIELDS = LINEAR_FIELDS | FieldTable(honoured=("r", "config_A_B", "config_C", "config_D_E", "bias"))
"""Every field of peft 0.21.2's GloraConfig."""


@dataclass(frozen=True)
class _Paths:
    """What each of A to E is made of: ``lora``, ``vector``, ``constant`` or ``none``."""

    rank: int
    a_b: str
    c: str
    d_e: str

    @classmethod
    def read(cls, config: ConfigFields) -> _Paths:
        return cls(
            rank=config.integer("r", 8, low=1, high=MAX_RANK),
            a_b=_choice(config, "config_A_B", "lora", ("lora", "vector", "constant", "none")),
            c=_choice(config, "config_C", "lora", ("lora", "vector", "none")),
            d_e=_choice(config, "config_D_E", "constant", ("vector", "constant", "none")),
        )


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "GLoRA")
    paths = _Paths.read(checkpoint.config)
    if paths.a_b == "lora":
        check_dense(base, sites)
    biases = take_biases(checkpoint, base, sites)
    # D scales the trained bias where there is one, so those of the sites are no mere difference to the base's.
    own = {site.path: biases.pop(site.path, base.bias(site)) for site in sites}
    forms = {site.path: _site_forms(checkpoint, base, site, paths, own[site.path]) for site in sites}
    return with_biases({path: form for path, form in forms.items() if form.parts()}, biases, base)


def _site_forms(checkpoint: Checkpoint, base: Base, site: Site, paths: _Paths, bias: torch.Tensor | None) -> SiteForms:
    weight_forms = _weight_forms(checkpoint, base, site, paths)
    has_bias = bias is not None
    columns, rows = (site.in_features, 1), (site.out_features,)
    c = _part(checkpoint, site, "C", paths.c if has_bias else "none", columns, paths.rank)
    d = _part(checkpoint, site, "D", paths.d_e if has_bias else "none", rows, paths.rank)
    e = _part(checkpoint, site, "E", paths.d_e if has_bias else "none", rows, paths.rank)
    if bias is None:
        return weight_forms
    base_bias = base.bias(site)
    assert base_bias is not None
    shift = bias * (1 + d) + e + (base.weight(site) @ c)[:, 0]
    scaled = base_bias if weight_forms.gain_out is None else weight_forms.gain_out * base_bias
    return SiteForms(weight_forms.low_rank, None, weight_forms.gain_out, shift - scaled, weight_forms.delta)


def _weight_forms(checkpoint: Checkpoint, base: Base, site: Site, paths: _Paths) -> SiteForms:
    shape = (site.out_features, site.in_features) if paths.a_b in ("lora", "none") else (site.out_features, 1)
    a = _part(checkpoint, site, "A", paths.a_b, shape, paths.rank)
    b = _part(checkpoint, site, "B", paths.a_b, shape, paths.rank)
    if paths.a_b == "lora":
        return SiteForms(delta=base.weight(site) * a + b)
    if paths.a_b == "none":
        return SiteForms()
    # A column of equal values for every input: a gain, and a factor of the sum of the inputs.
    return SiteForms(LowRank(torch.ones(1, site.in_features), b), gain_out=1 + a[:, 0])


def _part(checkpoint: Checkpoint, site: Site, part: str, kind: str, shape: tuple[int, ...], rank: int) -> torch.Tensor:
    """One of A to E, as large as ``shape``."""
    name = f"glora_{part}"
    if kind == "lora":
        down = site_tensor(checkpoint, site, f"{name}.Xd", (shape[0], rank))
        return down @ site_tensor(checkpoint, site, f"{name}.Xu", (rank, shape[1]))
    if kind == "vector":
        return site_tensor(checkpoint, site, f"{name}.X", shape)
    if kind == "constant":
        return site_tensor(checkpoint, site, f"{name}.X", (1,)).expand(shape)
    zeros = site_tensor(checkpoint, site, f"{name}.zeros", shape)
    if zeros.count_nonzero():
        full = f"{PREFIX}{site.path}.{name}.zeros"
        raise AdapterFormatError(f"{show(full)} must hold zeros alone", param=full[:200])
    return zeros


def _choice(config: ConfigFields, name: str, default: str, choices: tuple[str, ...]) -> str:
    value = config.text(name) or default
    if value not in choices:
        raise AdapterFormatError(f"{name} must be one of {', '.join(choices)}, got {show(value)}", param=name)
    return value
