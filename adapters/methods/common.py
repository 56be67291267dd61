"""What the loaders of peft's methods share: fields every config has, tensor names, casts, copies of base weights."""

from __future__ import annotations

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint, is_finite
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported

PREFIX = "base_model.model."
"""Before the module's path in every tensor name peft writes."""

COMMON_FIELDS = FieldTable(
    honoured=("peft_type", "task_type"),
    ignored={
        "auto_mapping": "names the classes the adapter was trained with",
        "base_model_name_or_path": "a name says little; the base is checked by its modules and their shapes",
        "inference_mode": "freezes the weights",
        "peft_version": "every field is checked whatever wrote it",
        "revision": "of base_model_name_or_path",
    },
)


def check_task(config: ConfigFields) -> None:
    """Refuse adapters that were not trained for a causal language model."""
    task = config.text("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterUnsupported(f"task_type={show(task)} is not served: only CAUSAL_LM generates", param="task_type")


def cast_finite(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A copy of ``tensor`` in ``dtype`` that shares no memory with the file.

    Raises:
        AdapterFormatError: a value is beyond the range of ``dtype``.
    """
    out = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if not is_finite(out):
        raise AdapterFormatError(f"{show(name)} overflows when scaled and cast to {dtype}", param=name[:200])
    return out


def take_base_copies(checkpoint: Checkpoint, base: Base) -> None:
    """Take the tensors that merely repeat a weight of the base.

    peft saves the whole head when an adapter targets it (``lm_head.base_layer.weight``), and the embeddings when it
    thinks they were resized, and on loading writes them over the base's. A copy that is equal changes nothing.

    Raises:
        AdapterUnsupported: a copy differs from the base, or the base is not loaded.
    """
    for name in checkpoint.tensors.left:
        parameter = base.parameters.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if parameter is None or not name.startswith(PREFIX):
            continue
        copy = checkpoint.tensors.take(name)
        if parameter.is_meta:
            raise AdapterUnsupported(f"{show(name)} can only be compared with a base that is loaded", param=name)
        if copy.shape != parameter.shape or not torch.equal(copy.to(parameter.dtype), parameter.cpu()):
            raise AdapterUnsupported(
                f"{show(name)} replaces a weight of the base by another one, which is not served", param=name
            )
