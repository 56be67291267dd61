"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751) for the demo, trained here and saved as AdapterHub saves them.

AdapterHub's library needs an older transformers than weft's; its file format is simple.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

CONFIG: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}
"""AdapterHub's ``double_seq_bn``, in the words of its ``BnConfig``."""


@dataclass(frozen=True)
class BottleneckConfig:
    """How narrow: the hidden size divided by ``reduction_factor``."""

    reduction_factor: int


class Bottleneck(nn.Module):
    """``f + U silu(D f + b_d) + b_u`` of a sublayer's output ``f``."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)
        nn.init.zeros_(self.up.weight)  # at first it changes nothing
        nn.init.zeros_(self.up.bias)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.up(nn.functional.silu(self.down(output)))
        return output + update


class BottleneckModel(nn.Module):
    """A frozen base with a bottleneck behind every attention and every feed-forward network."""

    def __init__(self, base: LlamaForCausalLM, reduction_factor: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.reduction_factor = reduction_factor
        width = base.config.hidden_size
        self.places: dict[str, Bottleneck] = {}
        for index, layer in enumerate(base.model.layers):
            for place, sublayer in (("attention", layer.self_attn), ("output", layer.mlp)):
                bottleneck = Bottleneck(width, width // reduction_factor)
                self.places[f"model.layers.{index}.{place}_adapters"] = bottleneck
                sublayer.register_forward_hook(_behind(bottleneck))
        self.bottlenecks = nn.ModuleList(self.places.values())

    def forward(self, **batch: torch.Tensor) -> CausalLMOutputWithPast:
        output: CausalLMOutputWithPast = self.base(**batch)
        return output

    def save(self, folder: Path, name: str) -> None:
        """Write the folder that AdapterHub's ``save_adapter`` would, in safetensors."""
        tensors = {}
        for place, bottleneck in self.places.items():
            for part, linear in (("adapter_down.0", bottleneck.down), ("adapter_up", bottleneck.up)):
                tensors[f"{place}.adapters.{name}.{part}.weight"] = linear.weight.detach().bfloat16()
                tensors[f"{place}.adapters.{name}.{part}.bias"] = linear.bias.detach().bfloat16()
        config = {
            "config": CONFIG | {"reduction_factor": self.reduction_factor},
            "hidden_size": self.base.config.hidden_size,
            "model_class": type(self.base).__name__,
            "model_type": self.base.config.model_type,
            "name": name,
        }
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


Output = torch.Tensor | tuple[torch.Tensor, ...]


def _behind(bottleneck: Bottleneck) -> Callable[[nn.Module, object, Output], Output]:
    """A forward hook that puts the bottleneck behind a module."""

    def hook(module: nn.Module, inputs: object, output: Output) -> Output:
        if isinstance(output, tuple):  # attention returns its weights too
            return bottleneck(output[0]), *output[1:]
        adapted: torch.Tensor = bottleneck(output)
        return adapted

    return hook
