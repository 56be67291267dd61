"""MELoRA (arXiv 2402.17263) as its authors' fork of peft has it: n small LoRAs, each from a part of the input to a part
of the output: y_i += α_i / r_i · B_i (A_i x_i)."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, as_integer, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, method_sites, site_tensor
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import MAX_RANK
from weft.adapters.parts import LowRank

MAX_PARTS = 1 << 10

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("r", "lora_alpha", "target_modules"),
    ignored={
        "fan_in_fan_out": "false for Linear, which alone is served",
        "init_lora_weights": "how the factors were initialised before training",
        "lora_dropout": "no dropout at inference",
        "mode": "the fork never reads it",
    },
    neutral={
        "bias": Neutral("trained biases are not served beside MELoRA", also=("none",)),
        "layers_to_transform": Neutral("the fork's peft chose layers by other rules"),
        "layers_pattern": Neutral("the fork's peft chose layers by other rules"),
    },
)
"""Every field of the fork's MELoraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The small factors lie on the diagonals of two large ones."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "MELoRA")
    ranks, scales = _read(checkpoint.config)
    return {site.path: SiteForms(_low_rank(checkpoint, site, ranks, scales)) for site in sites}


def _low_rank(checkpoint: Checkpoint, site: Site, ranks: list[int], scales: list[float]) -> LowRank:
    parts = len(ranks)
    width, height = site.in_features // parts, site.out_features // parts
    if height * parts != site.out_features or not width:
        raise AdapterMismatch(f"{parts} parts do not divide {site.out_features} outputs of {site.path}", param="r")
    a = [site_tensor(checkpoint, site, f"lora_A.{i}.weight", (rank, width)) for i, rank in enumerate(ranks)]
    b = [site_tensor(checkpoint, site, f"lora_B.{i}.weight", (height, rank)) for i, rank in enumerate(ranks)]
    rest = torch.zeros(sum(ranks), site.in_features - width * parts)  # which no part sees
    scaled = [factor * scale for factor, scale in zip(b, scales, strict=True)]
    return LowRank(torch.cat([torch.block_diag(*a), rest], dim=1), torch.block_diag(*scaled))


def _read(config: ConfigFields) -> tuple[list[int], list[float]]:
    """The rank and the scale of each part."""
    ranks, alphas = config.value("r", [2, 4, 6, 8]), config.value("lora_alpha", [16] * 4)
    if not isinstance(ranks, list) or not isinstance(alphas, list) or not len(ranks) == len(alphas) <= MAX_PARTS:
        raise AdapterFormatError(f"r and lora_alpha must be lists of one length, got {show(ranks)}", param="r")
    if not ranks:
        raise AdapterFormatError("r must name the rank of some part", param="r")
    checked = [as_integer("r", rank, low=1, high=MAX_RANK) for rank in ranks]
    scales = [as_number("lora_alpha", alpha) / rank for alpha, rank in zip(alphas, checked, strict=True)]
    return checked, scales
