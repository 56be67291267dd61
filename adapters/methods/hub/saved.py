"""An adapter as the AdapterHub library saved it: the fields around its config, and its tensors by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.parts import Gate
from weft.kernels.activations import Activation
from weft.kernels.mean_gates import Link

ENVELOPE = FieldTable(
    honoured=("config", "hidden_size", "model_type", "name", "version"),
    ignored={
        "config_id": "a digest of the config",
        "model_class": "the base is checked by its modules and their shapes",
        "model_name": "a name says little; the base is checked by its modules and their shapes",
        "type": "what the adapter was trained for",
    },
)
"""Every field that ``save_adapter`` of adapters 1.3.0 writes, and two of earlier versions."""

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "leaky_relu": Activation.LEAKY_RELU,
        "leakyrelu": Activation.LEAKY_RELU,
        "linear": Activation.IDENTITY,
        "relu": Activation.RELU,
        "sigmoid": Activation.SIGMOID,
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "tanh": Activation.TANH,
    }
)
"""By the names that the library and transformers have for them."""

RENAMED: Mapping[str, str] = MappingProxyType({"gelu": "gelu_new", "gelu_orig": "gelu"})
"""What the library makes of activations in configs that name no version."""

_NAME = re.compile(r"[^.]+")
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)\.")


@dataclass(frozen=True)
class Saved:
    """One adapter that is being read.

    Attributes:
        name: under which it was saved; part of every tensor's name.
        config: of one method; a union has several.
        version: of the library, if the file says it: major and minor. Releases before that was called ``adapters`` give
            (0, 0).
    """

    name: str
    config: ConfigFields
    checkpoint: Checkpoint
    base: Base
    version: tuple[int, int] | None

    def __contains__(self, tensor: str) -> bool:
        return self._found(tensor) in self.checkpoint.tensors

    def take(self, tensor: str, *shape: int) -> torch.Tensor:
        """One tensor in fp32, by its name in a model with a head: ``model.layers.0....``."""
        return self.checkpoint.tensors.take(self._found(tensor), shape).float()

    def gate(self, name: str, count: int, width: int) -> Gate:
        """The gate of what has this name: sigmoids, which the library takes the mean of over a forward pass."""
        weight, bias = self.take(f"{name}.weight", count, width), self.take(f"{name}.bias", count)
        return Gate(weight, bias, Link.SIGMOID)

    def _found(self, tensor: str) -> str:
        """Its name in the file: a model saved without a head has no ``model.`` in front."""
        bare = tensor.partition(".")[2]
        return bare if bare in self.checkpoint.tensors else tensor

    def activation(self, default: str) -> Activation:
        """The field ``non_linearity``."""
        value = (self.config.text("non_linearity") or default).lower()
        if self.version is None:
            value = RENAMED.get(value, value)
        if value not in ACTIVATIONS:
            raise AdapterUnsupported(
                f"non_linearity={show(value)} is not served; these are: {', '.join(ACTIVATIONS)}", param="non_linearity"
            )
        return ACTIVATIONS[value]

    def layers_left_out(self) -> frozenset[int]:
        """The field ``leave_out``."""
        return frozenset(self.config.integers("leave_out") or ())


def read_envelope(checkpoint: Checkpoint, base: Base, fields: FieldTable = ENVELOPE) -> tuple[Saved, str]:
    """What was saved, with all of ``config`` as its config, and the ``architecture`` that it names.

    Raises:
        AdapterMismatch: it belongs to another architecture or hidden size.
    """
    outer = checkpoint.config
    outer.check(fields)
    model_type, hidden = outer.text("model_type"), outer.value("hidden_size", None)
    if model_type != base.model_type or hidden not in (None, base.hidden_size):
        raise AdapterMismatch(
            f"the adapter is for {show(model_type)} of hidden size {show(hidden)}, the base is {base.model_type} of "
            f"{base.hidden_size}",
            param="model_type",
        )
    name = outer.text("name") or ""
    if not _NAME.fullmatch(name):
        raise AdapterFormatError(f"name must be a name without dots, got {show(name)}", param="name")
    config = ConfigFields(outer.mapping("config"))
    version = outer.text("version")
    found = _VERSION.match(version or "")
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    saved = Saved(name, config, checkpoint, base, numbers if version is not None else None)
    return saved, config.text("architecture") or "bottleneck"
