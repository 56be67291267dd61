"""ShadowPEFT (SHADOW): a small stack of layers of the base's class beside the base, its state mixed into every block.

The file holds the whole stack; its shapes follow from the config and the base's own configuration. peft writes the name
``default`` into the tensors' names whatever the adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.backbone import Backbone, Stack
from weft.adapters.base import Base
from weft.adapters.bottlenecks import Bottleneck
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.common import COMMON_FIELDS, PREFIX, check_memory, check_task
from weft.adapters.methods.targets import TARGET_FIELDS, targeted_paths
from weft.adapters.parts import LowRank
from weft.adapters.side import SideLayer, SideNetwork, SideSizes
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Input

NETWORK = "base_model.shadow_backbone.default."
PROJECTION = "base_model.shadow_projection.default.weight"
MAX_LAYERS = 64
MAX_WIDTH = 1 << 16
"""Bounds of what is built, without memory, to be compared with the file."""

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=(
        *TARGET_FIELDS,
        "r",
        "shadow_alpha",
        "shadow_model",
        "shadow_num_hidden_layers",
        "shadow_hidden_size",
        "shadow_num_attention_heads",
        "shadow_intermediate_size",
        "share_embeddings",
        "update_hidden_size",
    ),
    ignored={
        "auxiliary_loss_weight": "of a loss of the training",
        "init_weights": "initial weights are overwritten by the file",
        "shadow_dropout": "acts in training",
    },
)
"""Every field of peft 0.21.2's ShadowConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    check_task(config)
    config.check(FIELDS)
    model = config.text("shadow_model")
    if model not in (None, "mirror"):
        raise AdapterUnsupported(
            f"shadow_model={show(model)} is not served: another checkpoint says how the network is built, and the "
            "adapter does not contain it",
            param="shadow_model",
        )
    if base.backbone is None:
        raise AdapterMismatch(f"peft finds no stack of layers in this {base.model_type} model", param="peft_type")
    layers = _blocks(config, base, base.backbone)
    sizes = _sizes(config, base)
    stack = _stack(base, base.backbone, sizes)
    _check_saved(config, stack, base, layers)
    rank = config.integer("r", 8, low=1, high=MAX_WIDTH)
    units = _optional(config, "update_hidden_size", MAX_WIDTH) or rank
    alpha = config.number("shadow_alpha", 0.1)
    width = base.hidden_size
    numbers = sum(torch.Size(shape).numel() for name, shape in stack.shapes.items() if name != stack.unused)
    check_memory(base, numbers + len(layers) * width * (2 * rank + 4 * units + 2))
    forms = {path: SiteForms(side=_layer(checkpoint, path, width, rank, units, alpha)) for path in layers}
    return {base.backbone.path: SiteForms(network=_network(checkpoint, stack, sizes, width)), **forms}


def _blocks(config: ConfigFields, base: Base, backbone: Backbone) -> list[str]:
    """The layers that take part: by default all of them, and always one after the other."""
    layers = backbone.layers
    paths = targeted_paths(config, base, {base.model_type: layers})
    other = next((path for path in paths if path not in layers), None)
    if other is not None:
        raise AdapterUnsupported(
            f"target_modules selects {show(other)}, which is not a whole decoder layer; only such are served",
            param="target_modules",
        )
    first = layers.index(paths[0])
    if tuple(paths) != layers[first : first + len(paths)]:
        raise AdapterUnsupported(
            "target_modules leaves out layers between others, which peft itself cannot run", param="target_modules"
        )
    return list(paths)


def _sizes(config: ConfigFields, base: Base) -> SideSizes:
    hidden = _optional(config, "shadow_hidden_size", MAX_WIDTH)
    return SideSizes(
        layers=_optional(config, "shadow_num_hidden_layers", MAX_LAYERS) or 1,
        hidden=hidden,
        intermediate=_optional(config, "shadow_intermediate_size", MAX_WIDTH),
        heads=_optional(config, "shadow_num_attention_heads", MAX_WIDTH),
        embeds=not config.flag("share_embeddings", True) or hidden not in (None, base.hidden_size),
    )


def _optional(config: ConfigFields, name: str, high: int) -> int | None:
    return None if config.value(name, None) is None else config.integer(name, 1, low=1, high=high)


def _stack(base: Base, backbone: Backbone, sizes: SideSizes) -> Stack:
    try:
        return backbone.smaller(sizes, base.dtype)
    except Exception as error:  # whatever the class says of sizes that do not fit together
        raise AdapterMismatch(
            f"no {base.model_type} of these shadow_ sizes can be built, in peft neither: {show(str(error))}",
            param="shadow_hidden_size",
        ) from error


def _check_saved(config: ConfigFields, stack: Stack, base: Base, layers: Sequence[str]) -> None:
    """peft replaces what ``modules_to_save`` names inside the network and its blocks too, under other names.

    Raises:
        AdapterUnsupported: there is such a module.
    """
    names = config.names("modules_to_save") or ()
    endings = (names,) if isinstance(names, str) else names
    inside = [f"{NETWORK}{path}".rstrip(".") for path, _ in stack.module.named_modules()]
    inside += ["base_model.shadow_backbone", "base_model.shadow_projection", "base_model.shadow_head", PROJECTION[:-7]]
    for layer in layers:
        inside += [f"{PREFIX}{path}" for path in base.module_paths if f"{path}.".startswith(f"{layer}.")]
        parts = (part for part in ("down", "up", "update_transform", "update_gate", "dropout"))
        inside += [f"{PREFIX}{layer}.shadow_{part}{end}" for part in parts for end in ("", *_ENDS)]
        inside.append(f"{PREFIX}{layer}.base_layer")
    hit = next((path for path in inside if endings and path.endswith(endings)), None)
    if hit is not None:
        raise AdapterUnsupported(
            f"modules_to_save replaces {show(hit)} too, a part of the adapter or of a layer that it wraps",
            param="modules_to_save",
        )


_ENDS = (".default", ".default.0", ".default.1", ".default.2")


def _layer(checkpoint: Checkpoint, path: str, width: int, rank: int, units: int, alpha: float) -> SideLayer:
    def take(name: str, *shape: int) -> torch.Tensor:
        return checkpoint.tensors.take(f"{PREFIX}{path}.shadow_{name}", shape).float()

    def update(name: str) -> Bottleneck:
        first, second = f"update_{name}.default.0", f"update_{name}.default.2"
        return Bottleneck(
            down=take(f"{first}.weight", units, width),
            down_bias=take(f"{first}.bias", units),
            up=take(f"{second}.weight", width, units),
            up_bias=take(f"{second}.bias", width),
            activation=Activation.GELU,
            input=Input.RESIDUAL,
        )

    down, up = take("down.default.weight", rank, width), take("up.default.weight", width, rank)
    return SideLayer(LowRank(down, alpha * up), update("transform"), update("gate"))


def _network(checkpoint: Checkpoint, stack: Stack, sizes: SideSizes, width: int) -> SideNetwork:
    # All are checked against the file, also an embedding that is never looked at.
    weights = {name: checkpoint.tensors.take(f"{NETWORK}{name}", shape) for name, shape in stack.shapes.items()}
    weights = {name: weight.float() for name, weight in weights.items() if name != stack.unused}
    if sizes.hidden not in (None, width):
        weights[""] = checkpoint.tensors.take(PROJECTION, (width, sizes.hidden)).float()
    return SideNetwork(sizes, tuple(weights), tuple(weights.values()), width)
