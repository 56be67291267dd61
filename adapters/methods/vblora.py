"""VB-LoRA (arXiv 2405.15179): y += B (A x), cut into vectors, each a mix of the k likeliest of one bank's.

The weights of a mix are the softmax of the k largest logits. A file for inference has them instead of the logits, the
last left out because they add up to 1, and which vectors they are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, PREFIX, check_memory, method_sites, site_tensor, take_biases
from weft.adapters.methods.lora import MAX_RANK, with_biases
from weft.adapters.methods.targets import TARGET_FIELDS
from weft.adapters.parts import LowRank

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "bias", *TARGET_FIELDS),
    ignored={
        "fan_in_fan_out": "peft corrects it to what the module is: true for Conv1D, false for Linear",
        "init_logits_std": "how the logits were initialised before training",
        "init_vector_bank_bound": "how the bank was initialised before training",
        "vblora_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's VBLoRAConfig."""

BANK = "base_model.vblora_vector_bank"


@dataclass(frozen=True)
class _Bank:
    """The vectors ``[count, length]``, ``topk`` of which are mixed, and whether the file has weights or logits."""

    vectors: torch.Tensor
    topk: int
    only_topk: bool

    @classmethod
    def read(cls, checkpoint: Checkpoint, sites: Sequence[Site]) -> _Bank:
        config = checkpoint.config
        count = config.integer("num_vectors", 256, low=1, high=1 << 31)
        length = config.integer("vector_length", 256, low=1, high=1 << 31)
        for site in sites:
            if site.in_features % length or site.out_features % length:
                raise AdapterMismatch(
                    f"vector_length {length} does not divide {site.path} of {site.out_features} by {site.in_features}",
                    param="vector_length",
                )
        topk = config.integer("topk", 2, low=1, high=count)
        vectors = checkpoint.tensors.take(BANK, (count, length)).float()
        return cls(vectors, topk, config.flag("save_only_topk_weights"))

    def mixes(self, checkpoint: Checkpoint, site: Site, part: str, shape: tuple[int, int]) -> torch.Tensor:
        """``[*shape, length]``"""
        if self.only_topk:
            indices, weights = self._saved(checkpoint, site, part, shape)
        else:
            logits, indices = site_tensor(checkpoint, site, part, (*shape, len(self.vectors))).topk(self.topk)
            weights = logits.softmax(-1)
        mixed = torch.zeros(*shape, self.vectors.shape[1])
        for k in range(self.topk):
            mixed += weights[..., k, None] * self.vectors[indices[..., k]]
        return mixed

    def _saved(
        self, checkpoint: Checkpoint, site: Site, part: str, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = f"{PREFIX}{site.path}.{part}_topk_indices"
        indices = checkpoint.tensors.take(name, (*shape, self.topk), integers=True)
        inside = 0 <= int(indices.min()) <= int(indices.max()) < len(self.vectors)
        if not inside or not bool(indices.sort(-1).values.diff(dim=-1).all()):
            count = len(self.vectors)
            raise AdapterFormatError(f"{show(name)} must name different ones of {count} vectors", param=name[:200])
        most = site_tensor(checkpoint, site, f"{part}_topk_weights", (*shape, self.topk - 1))
        weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
        if bool((weights < -1e-2).any()):
            raise AdapterFormatError(
                f"{show(site.path)}: the weights of {part} add up to more than 1", param=name[:200]
            )
        return indices, weights.clamp(min=0)


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.ADALORA)
    rank = checkpoint.config.integer("r", 4, low=1, high=MAX_RANK)
    bank = _Bank.read(checkpoint, sites)
    check_memory(base, rank * sum(site.in_features + site.out_features for site in sites))
    biases = take_biases(checkpoint, base, sites)
    length = bank.vectors.shape[1]
    forms = {}
    for site in sites:
        a = bank.mixes(checkpoint, site, "vblora_logits_A", (rank, site.in_features // length))
        b = bank.mixes(checkpoint, site, "vblora_logits_B", (site.out_features // length, rank))
        forms[site.path] = SiteForms(
            LowRank(a.reshape(rank, site.in_features), b.transpose(1, 2).reshape(site.out_features, rank))
        )
    return with_biases(forms, biases, base)
