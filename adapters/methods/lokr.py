"""LoKr (arXiv 2309.14859) as peft has it: W += α / r · w1 ⊗ w2 (Kronecker), where w1, w2 may be products themselves."""

from __future__ import annotations

import math

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, factors, loha
from weft.adapters.methods.common import check_memory, method_sites, site_tensor
from weft.adapters.parts import LowRank

FIELDS = loha.LYCORIS_FIELDS | FieldTable(
    honoured=("decompose_both", "decompose_factor"),
    ignored={"rank_dropout_scale": "no dropout at inference"},
)
"""Every field of peft 0.21.2's LoKrConfig."""

_Pair = tuple[torch.Tensor, torch.Tensor]
"""``[rows, n]`` and ``[n, columns]``, n as small as can be told from the shapes."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    factors.refuse_conv1d(sites, "LoKr")
    ranks = factors.site_ranks(config, sites, 8)
    alphas = factors.site_alphas(config, sites, 8)
    both = config.flag("decompose_both")
    near = config.integer("decompose_factor", -1, low=-(1 << 31), high=1 << 31)
    forms, needed = {}, 0
    for site in sites:
        rank = ranks[site.path]
        rows, columns = _split(site.out_features, near), _split(site.in_features, near)
        first_whole = not (both and 2 * rank < max(rows[0], columns[0]))
        first = _pair(checkpoint, site, "lokr_w1", (rows[0], columns[0]), rank, whole=first_whole)
        second_whole = 2 * rank >= max(rows[1], columns[1])
        second = _pair(checkpoint, site, "lokr_w2", (rows[1], columns[1]), rank, whole=second_whole)
        needed += factors.numbers(first[1].shape[0] * second[1].shape[0], site)
        check_memory(base, needed)
        forms[site.path] = _update(first, second, alphas[site.path] / rank, site)
    return forms


def _split(width: int, near: int) -> tuple[int, int]:
    """Two factors of ``width``: ``near`` comes first if it is one.

    Else the first is the largest that is no greater than the second, nor than ``near`` unless that is -1.
    """
    if near > 0 and width % near == 0:
        return near, width // near
    limit = min(math.isqrt(width), width if near == -1 else near)
    first = next((divisor for divisor in range(limit, 1, -1) if width % divisor == 0), 1)
    return first, width // first


def _pair(checkpoint: Checkpoint, site: Site, name: str, shape: tuple[int, int], rank: int, *, whole: bool) -> _Pair:
    if whole:
        matrix = site_tensor(checkpoint, site, name, shape)
    else:
        left = site_tensor(checkpoint, site, f"{name}_a", (shape[0], rank))
        right = site_tensor(checkpoint, site, f"{name}_b", (rank, shape[1]))
        if rank <= min(shape):
            return left, right
        matrix = left @ right
    identity = torch.eye(min(shape))
    return (identity, matrix) if shape[0] < shape[1] else (matrix, identity)


def _update(first: _Pair, second: _Pair, scale: float, site: Site) -> SiteForms:
    """Kronecker products multiply factor by factor: the update's rank is at most the product of theirs."""
    if factors.pays(first[1].shape[0] * second[1].shape[0], site):
        return SiteForms(LowRank(a=torch.kron(first[1], second[1]), b=torch.kron(first[0], second[0]) * scale))
    return SiteForms(delta=torch.kron(first[0] @ first[1], second[0] @ second[1]) * scale)
