"""Compacter's weights (arXiv 2106.04647): sums of Kronecker products, H = Σ_i rule_i ⊗ W_i, y = x H + b."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.methods.hub.saved import Saved

MAX_DIM = 1 << 8


@dataclass(frozen=True)
class Products:
    """How the weights of one config are made.

    Attributes:
        dim: how many products are added.
        rank: of the factors of W_i; None: it is saved whole.
        rule_rank: likewise, of the rules.
        shared_rule, shared_weights: the layers share them.
    """

    saved: Saved
    dim: int
    rank: int | None
    rule_rank: int | None
    shared_rule: bool
    shared_weights: bool
    bias: bool

    @classmethod
    def read(cls, saved: Saved) -> Products:
        config = saved.config
        rank = config.integer("phm_rank", 1, low=1, high=MAX_DIM)
        return cls(
            saved,
            dim=config.integer("phm_dim", 4, low=1, high=MAX_DIM),
            rank=rank if config.flag("factorized_phm_W", True) else None,
            rule_rank=1 if config.flag("factorized_phm_rule") else None,
            shared_rule=config.flag("shared_phm_rule", True),
            shared_weights=config.flag("shared_W_phm"),
            bias=config.flag("phm_bias", True),
        )

    def weight(self, name: str, position: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight ``[outputs, inputs]`` and bias ``[outputs]`` of one projection.

        Args:
            name: of the projection's own tensors.
            position: ``down`` or ``up``, in the names of tensors that all layers share.
        """
        n, saved = self.dim, self.saved
        if max(inputs, outputs) > saved.base.hidden_size:
            raise AdapterUnsupported(
                "reduction_factor below 1 is not served with phm_layer: small factors would make weights of any size",
                param="reduction_factor",
            )
        if inputs % n or outputs % n:
            raise AdapterMismatch(f"phm_dim={n} does not divide {inputs} and {outputs}", param="phm_dim")
        shared = f"{_top(saved)}.shared_parameters.{saved.name}"
        rule = _matrices(saved, f"{shared if self.shared_rule else name}.phm_rule", (n, n, n), self.rule_rank)
        own = f"{shared}.W_{position}" if self.shared_weights else f"{name}.W"
        weight = _matrices(saved, own, (n, inputs // n, outputs // n), self.rank)
        total = sum((torch.kron(a, b) for a, b in zip(rule, weight, strict=True)), torch.zeros(inputs, outputs))
        return total.T, saved.take(f"{name}.b", outputs) if self.bias else torch.zeros(outputs)


def _matrices(saved: Saved, name: str, shape: tuple[int, int, int], rank: int | None) -> torch.Tensor:
    """``[count, rows, columns]``, whole or as the product of a left and a right factor of ``rank``."""
    count, rows, columns = shape
    if rank is None:
        return saved.take(name, *shape)
    return saved.take(f"{name}_left", count, rows, rank) @ saved.take(f"{name}_right", count, rank, columns)


def _top(saved: Saved) -> str:
    """The module that holds the layers: ``model`` of ``model.layers.0.mlp``."""
    return next(iter(saved.base.sublayers)).partition(".")[0]
