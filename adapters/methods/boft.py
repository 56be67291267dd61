"""BOFT (arXiv 2311.06243) as peft has it: y = s ⊙ (W (x R)) + b0, R the product of butterfly factors, each a rotation
in blocks between a permutation and its inverse.

peft makes several factors only where its CUDA extension compiles, and elsewhere one, whatever the config says; the file
tells. Factor i mixes blocks of 2^i times the config's, so that the product is block-diagonal as well.
"""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.cayley import cayley, rotation_rows
from weft.adapters.methods.common import (
    COMMON_FIELDS,
    PREFIX,
    check_memory,
    method_sites,
    site_tensor,
    take_biases,
)
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=(
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
        "bias",
        *TARGET_FIELDS,
    ),
    ignored={
        "boft_dropout": "no dropout at inference",
        "fan_in_fan_out": "peft adapts no Conv1D with BOFT",
        "init_weights": "how the parameters were initialised before training",
    },
)
"""Every field of peft 0.21.2's BOFTConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "BOFT")
    most_factors = config.integer("boft_n_butterfly_factor", 1, low=1, high=32)
    sizes = _block_sizes(config, sites)
    factors = {site.path: _factors(checkpoint, site, sizes[site.path], most_factors) for site in sites}
    check_memory(base, sum((sizes[site.path] << factors[site.path] - 1) * site.in_features for site in sites))
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        gain = site_tensor(checkpoint, site, "boft_s", (site.out_features, 1))[:, 0]
        bias = base.bias(site)
        forms[site.path] = SiteForms(
            rotate_in=_rotation(checkpoint, site, sizes[site.path], factors[site.path]),
            gain_out=gain,
            shift=None if bias is None else bias - gain * bias,
        )
    return with_biases(forms, biases, base)


def _block_sizes(config: ConfigFields, sites: list[Site]) -> dict[str, int]:
    """The size of the blocks by path."""
    size = config.integer("boft_block_size", 4, low=0, high=1 << 24)
    count = config.integer("boft_block_num", 0, low=0, high=1 << 24)
    if (count == 0) == (size == 0):
        raise AdapterFormatError(
            f"one of boft_block_num={count} and boft_block_size={size} must be 0", param="boft_block_size"
        )
    name = "boft_block_size" if size else "boft_block_num"
    for site in sites:
        if site.in_features % (size or count):
            raise AdapterMismatch(
                f"{name}={size or count} does not divide the {site.in_features} inputs of {site.path}", param=name
            )
    return {site.path: size or site.in_features // count for site in sites}


def _factors(checkpoint: Checkpoint, site: Site, size: int, most: int) -> int:
    """How many the file has: as many as the config says, or one."""
    saved = checkpoint.tensors.shapes.get(f"{PREFIX}{site.path}.boft_R", (1,))
    factors = most if saved[0] == most else 1
    if factors > 1 and (size % 2 or site.in_features % (size << (factors - 1))):
        raise AdapterMismatch(
            f"{factors} butterfly factors with blocks of {size} do not fit {site.in_features} inputs of {site.path}",
            param="boft_n_butterfly_factor",
        )
    return factors


def _rotation(checkpoint: Checkpoint, site: Site, size: int, factors: int) -> torch.Tensor:
    """``SiteForms.rotate_in`` of a site."""
    width = size << (factors - 1)
    count = site.in_features // width
    free = site_tensor(checkpoint, site, "boft_R", (factors, site.in_features // size, size, size)).double()
    turned = cayley((free - free.mT) / 2).view(factors, count, width // size, size, size)
    product = torch.eye(width, dtype=torch.float64).expand(count, width, width)
    for i in range(factors):
        order = _butterfly(width, size << i, size // 2) if factors > 1 else torch.arange(width)
        product = _block_diagonal(turned[i])[:, order][:, :, order] @ product
    return rotation_rows(product, count)


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """``[count, n · size, n · size]`` of ``[count, n, size, size]``."""
    count, n, size, _ = blocks.shape
    matrix = blocks.new_zeros(count, n, size, n, size)
    matrix[:, range(n), :, range(n)] = blocks.transpose(0, 1)
    return matrix.view(count, n * size, n * size)


def _butterfly(width: int, span: int, half: int) -> torch.Tensor:
    """Where each of ``width`` places comes from: in every span of it, the even runs of ``half`` before the odd ones."""
    runs = torch.arange(width).view(-1, span // half, half)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], dim=1).flatten()
