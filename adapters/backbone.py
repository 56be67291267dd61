"""The stack of layers inside a base, and smaller ones of the same class: what side networks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from weft.adapters.side import SideSizes

PLACES = ("model", "transformer", "base_model", "decoder")
LISTS = ("layers", "h")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner")
HEADS = ("num_attention_heads", "n_head", "num_heads")
"""Where peft 0.21.2 looks for the stack and its layers, and under which names for the sizes of it."""


@dataclass(frozen=True)
class Backbone:
    """The module of a base that holds its layers.

    Attributes:
        path: e.g. ``model``.
        layers: paths of its layers, in the order they run.
        make: its class.
        config: of the base.
    """

    path: str
    layers: tuple[str, ...]
    make: Callable[[Any], PreTrainedModel] = field(repr=False)
    config: PretrainedConfig = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Backbone | None:
        """The stack as peft finds it (``_get_backbone`` of ``peft.tuners.shadow``); None where there is none."""
        found = next((module for name in PLACES if isinstance(module := getattr(model, name, None), nn.Module)), None)
        nested = getattr(found, "decoder", None)
        stack = nested if isinstance(nested, nn.Module) and _layers(nested) else found
        name, path = _layers(stack), next((path for path, module in model.named_modules() if module is stack), "")
        if not isinstance(stack, PreTrainedModel) or not path or name is None:
            return None
        count = len(getattr(stack, name))
        return cls(path, tuple(f"{path}.{name}.{index}" for index in range(count)), type(stack), stack.config)

    def smaller(self, sizes: SideSizes, dtype: torch.dtype) -> Stack:
        """A stack of these sizes on the CPU, in eval mode; see ``_build_shadow_backbone`` of ``peft.tuners.shadow``.

        Raises:
            Exception: whatever the class says of sizes that do not fit together.
        """
        config = deepcopy(self.config)
        for names, value in (
            (LAYERS, sizes.layers),
            (HIDDEN, sizes.hidden),
            (INTERMEDIATE, sizes.intermediate),
            (HEADS, sizes.heads),
        ):
            if value is not None:
                setattr(config, next(name for name in names if hasattr(config, name)), value)
        _fit_layers(config, sizes.layers)
        with _WithoutMemory():
            module = self.make(config)
        vectors = module.get_input_embeddings()
        embedding = next(path for path, found in module.named_modules() if found is vectors)
        if not sizes.embeds and embedding == "embed_tokens":  # peft removes it by this name only
            del module.embed_tokens
        # As peft casts it: the angles of rotary embeddings too.
        nn.Module.to(module, dtype=dtype).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return Stack(module, shapes, None if sizes.embeds else f"{embedding}.weight")


@dataclass(frozen=True)
class Stack:
    """A stack without weights, which are on ``meta`` or have no meaning: ``functional_call`` gives it others.

    Attributes:
        shapes: by name, of what a file of it holds.
        unused: the name of an embedding in place of which the base's vectors are used.
    """

    module: PreTrainedModel
    shapes: Mapping[str, tuple[int, ...]]
    unused: str | None


def move_buffers(stack: nn.Module, device: torch.device) -> None:
    """Bring to the device what the stack keeps beside its weights, such as the angles of rotary embeddings."""
    for module in stack.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


class _WithoutMemory(TorchFunctionMode):
    """Tensors without values, which is what weights are before they are loaded, take no memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        return func(*args, **(given | {"device": "meta"} if func is torch.empty else given))


def _layers(stack: object) -> str | None:
    """The name of the list of its layers."""
    return next((name for name in LISTS if isinstance(getattr(stack, name, None), nn.ModuleList)), None)


def _fit_layers(config: Any, layers: int) -> None:
    """What a configuration says of every layer, for another number of layers (``_normalize_layer_config`` of peft)."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kinds = list(kinds) or ["full_attention"]
        config.layer_types = (kinds + [kinds[-1]] * layers)[:layers]
    window = getattr(config, "max_window_layers", None)
    if isinstance(window, int) and window > layers:
        config.max_window_layers = layers
