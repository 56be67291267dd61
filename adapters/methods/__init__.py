"""Every method weft serves, one file each: config and tensors in, forms out.

To add one: write ``methods/<name>.py`` with ``compile_sites(checkpoint, base, dtype)``, name it in ``METHODS``, and
test it against peft. The loader classifies every config field of the method in a ``FieldTable`` and takes every tensor;
``checkpoint.finish()`` refuses what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint, read_checkpoint
from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import CompiledAdapter, SiteForms

METHODS: Mapping[str, str] = MappingProxyType({"LORA": "lora"})
"""peft_type to the module of this package that serves it; imported when first used."""


class Method(Protocol):
    """What a module of this package offers."""

    def compile_sites(self, checkpoint: Checkpoint, base: Base, dtype: torch.dtype) -> dict[str, SiteForms]:
        """Forms by module path, in ``dtype`` on the CPU; every field and tensor of ``checkpoint`` used."""


def compile_adapter(folder: Path, base: Base, *, version: str, dtype: torch.dtype | None = None) -> CompiledAdapter:
    """Read the adapter in ``folder``, check it in full against ``base`` and reduce it to forms on the CPU.

    Args:
        version: the digest of its content.
        dtype: of the forms' tensors; None: the base's.

    Raises:
        AdapterError: it cannot be read, does not fit the base, or cannot be served exactly; names the field or tensor.
    """
    checkpoint = read_checkpoint(folder)
    peft_type = checkpoint.config.text("peft_type")
    if peft_type is None:
        raise AdapterFormatError("adapter_config.json names no peft_type; is it saved by peft?", param="peft_type")
    if peft_type not in METHODS:
        served = ", ".join(METHODS)
        raise AdapterUnsupported(f"peft_type {show(peft_type)} is not served; these are: {served}", param="peft_type")
    method = cast(Method, import_module(f"{__name__}.{METHODS[peft_type]}"))
    sites = method.compile_sites(checkpoint, base, dtype or base.dtype)
    return CompiledAdapter(version=version, method=peft_type, sites=sites)
