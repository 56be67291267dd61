"""MoRA (arXiv 2405.12130) as its authors' fork of peft has it: y += E M C x with M square, C x a sum of parts of x.

A LoRA config that says ``use_mora``. r̂ = ⌊√((in + out) r) + ½⌋; C sums, and E repeats, without parameters, by
``mora_type``. The input is continued by its own beginning up to a multiple of r̂, and nothing is scaled.
"""

from __future__ import annotations

import math

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, Neutral, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults, lora
from weft.adapters.methods.common import PREFIX, method_sites, site_tensor
from weft.adapters.methods.factors import product, refuse_conv1d, site_ranks
from weft.adapters.methods.targets import TARGET_FIELDS

SHARED, GROUPED_BOTH, GROUPED_INPUT, GROUPED_OUTPUT, ROTATED = 1, 2, 3, 4, 6

FIELDS = lora.SHARED_FIELDS | FieldTable(
    honoured=("use_mora", "mora_type", "r", "rank_pattern", *TARGET_FIELDS),
    ignored={
        "alpha_pattern": "MoRA scales nothing",
        "init_lora_weights": "MoRA starts from zero",
        "lora_alpha": "MoRA scales nothing",
        "use_rslora": "MoRA scales nothing",
    },
    neutral={
        "bias": Neutral("MoRA's fork saves biases beside it in a way that is not known", also=("none",)),
        "ensure_weight_tying": Neutral("MoRA's fork ties nothing"),
        "lora_bias": Neutral("MoRA has none"),
        "trainable_token_indices": Neutral("MoRA's fork trains no tokens"),
    },
)
"""Every field of the fork's LoraConfig, and of peft 0.21.2's."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. C is folded into A and E into B; the rotated type is no product of low rank."""
    config = checkpoint.config
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "MoRA")
    kind = config.value("mora_type", 1)
    if type(kind) is not int or kind not in (SHARED, GROUPED_BOTH, GROUPED_INPUT, GROUPED_OUTPUT, ROTATED):
        raise AdapterUnsupported(f"mora_type={show(kind)} is none of 1, 2, 3, 4 and 6", param="mora_type")
    config.flag("use_mora")
    ranks = site_ranks(config, sites, 8)
    return {site.path: _site_forms(checkpoint, site, ranks[site.path], kind) for site in sites}


def _site_forms(checkpoint: Checkpoint, site: Site, r: int, kind: int) -> SiteForms:
    width, height = site.in_features, site.out_features
    rank = int(math.sqrt((width + height) * r) + 0.5)
    square = _square(checkpoint, site, rank)
    if kind in (SHARED, GROUPED_OUTPUT, ROTATED) and -width % rank > width:
        raise AdapterMismatch(f"r={r} gives {site.path} more rows, {rank}, than its input has to fill them", param="r")
    if kind == ROTATED:
        if rank % 2:
            raise AdapterMismatch(f"mora_type 6 needs an even rank at {site.path}, got {rank}", param="r")
        return SiteForms(delta=_rotated(square, width, height))
    a = square[:, _groups(rank, width)] if kind in (GROUPED_BOTH, GROUPED_INPUT) else _wrapped(square, width)
    rows = _groups(rank, height) if kind in (GROUPED_BOTH, GROUPED_OUTPUT) else torch.arange(height) % rank
    return product(torch.nn.functional.one_hot(rows, rank).float(), a, site)


def _square(checkpoint: Checkpoint, site: Site, rank: int) -> torch.Tensor:
    """M, which the fork saves once more as B, because B is the same module."""
    square = site_tensor(checkpoint, site, "lora_A.weight", (rank, rank))
    name = f"{PREFIX}{site.path}.lora_B.weight"
    if name in checkpoint.tensors and not torch.equal(checkpoint.tensors.take(name, (rank, rank)).float(), square):
        raise AdapterMismatch(f"{show(name)} differs from lora_A, which MoRA has it share", param=name[:200])
    return square


def _groups(rank: int, width: int) -> torch.Tensor:
    """For each of ``width`` neighbours the one of ``rank`` groups it is in; the first groups have one more."""
    fewer, longer = divmod(width, rank)
    sizes = torch.full((rank,), fewer)
    sizes[:longer] += 1
    return torch.arange(rank).repeat_interleave(sizes)


def _wrapped(square: torch.Tensor, width: int) -> torch.Tensor:
    """M C: element i of the input goes to i mod r̂, and the beginning once more to what is left of the last part."""
    rank = len(square)
    result = square[:, torch.arange(width) % rank].clone()
    again = torch.arange(width, width + -width % rank)
    result[:, again - width] += square[:, again % rank]
    return result


def _rotated(square: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """``[height, width]``: part k of the input is rotated by k positions, as RoFormer rotates, before M."""
    rank = len(square)
    parts = -(-width // rank)
    angles = torch.outer(torch.arange(parts), 1.0 / (10000 ** (torch.arange(0, rank, 2).float() / rank))).repeat(1, 2)
    turned = torch.cat([square[:, rank // 2 :], -square[:, : rank // 2]], dim=1)
    whole = torch.zeros(parts * rank, width)
    for part in range(parts):
        block = square * angles[part].cos() + turned * angles[part].sin()
        columns = torch.arange(part * rank, (part + 1) * rank) % width
        whole[part * rank : (part + 1) * rank, columns] = block
    return whole[torch.arange(height) % len(whole)]
