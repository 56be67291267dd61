"""What an adapter must know of its base: the linear sites it can attach to, by module path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Site:
    """One linear module of the base.

    Attributes:
        path: its name in ``model.named_modules()``, e.g. ``model.layers.0.self_attn.q_proj``.
        kind: ``"linear"`` (weight ``[out, in]``) or ``"conv1d"`` (GPT-2's, weight ``[in, out]``).
        in_features, out_features: widths of the product, whatever the storage order.
        has_bias: whether the base adds a bias here.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    has_bias: bool


@dataclass(frozen=True)
class Base:
    """The base model as seen by a loader.

    Attributes:
        model_type: transformers' name of the architecture (``config.model_type``).
        num_layers: ``config.num_hidden_layers``.
        sites: linear modules by path, in the order of ``named_modules()``.
        module_paths: every module's path, to tell "not a linear" from "not there".
        dtype: of the base's weights.
        head: path of the module that makes the logits (``lm_head``), if the model names one.
        parameters: the base's own parameters by name, tied ones under each of their names; references, no copies.
    """

    model_type: str
    num_layers: int
    sites: Mapping[str, Site]
    module_paths: tuple[str, ...]
    dtype: torch.dtype
    head: str | None = None
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Base:
        """Describe ``model`` (a transformers causal LM, on any device, ``meta`` included)."""
        sites = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                sites[path] = Site(path, "linear", module.in_features, module.out_features, module.bias is not None)
            elif isinstance(module, Conv1D):
                sites[path] = Site(path, "conv1d", module.nx, module.nf, True)
        config = model.config
        output = model.get_output_embeddings()
        head = next((path for path, module in model.named_modules() if module is output), None)
        return cls(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            sites=sites,
            module_paths=tuple(path for path, _ in model.named_modules()),
            dtype=model.dtype,
            head=head,
            parameters={name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)},
        )
