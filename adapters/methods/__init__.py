"""Every method weft serves, one file each: config and tensors in, forms out.

To add one: write ``methods/<name>.py`` with ``compile_sites(checkpoint, base)``, name it in ``METHODS``, and test it
against peft. The loader classifies every config field of the method in a ``FieldTable`` and takes every tensor; what is
left is refused here. Adapters of the AdapterHub library have a format of their own, read in ``hub/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint, read_checkpoint
from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.files import CHAIN, DIFFERENCES, MODEL_CONFIG, present
from weft.adapters.forms import CompiledAdapter, Prompt, SiteForms
from weft.adapters.methods.chain import compile_chain
from weft.adapters.methods.common import cast_forms, take_base_copies
from weft.adapters.methods.differences import compile_differences
from weft.adapters.methods.hub import compile_hub, is_hub
from weft.adapters.methods.saved_modules import check_apart, take_saved_modules
from weft.adapters.methods.unserved import check_served
from weft.adapters.methods.whole_models import compile_model

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "LORA": "lora",
        "ADALORA": "adalora",
        "IA3": "ia3",
        "VERA": "vera",
        "PVERA": "pvera",
        "LOHA": "loha",
        "LOKR": "lokr",
        "HRA": "hra",
        "MISS": "miss",
        "DELORA": "delora",
        "GRALORA": "gralora",
        "RANDLORA": "randlora",
        "HIRA": "hira",
        "DEFT": "deft",
        "SHIRA": "shira",
        "FOURIERFT": "fourierft",
        "C3A": "c3a",
        "BEFT": "beft",
        "VBLORA": "vblora",
        "SUPERTUNING": "supertuning",
        "WAVEFT": "waveft",
        "GLORA": "glora",
        "FROD": "frod",
        "UNILORA": "unilora",
        "OSF": "osf",
        "PSOFT": "psoft",
        "TINYLORA": "tinylora",
        "LN_TUNING": "ln_tuning",
        "TRAINABLE_TOKENS": "trainable_tokens",
        "PEANUT": "peanut",
        "ADAPTION_PROMPT": "adaption_prompt",
        "ADAMSS": "adamss",
        "POLY": "poly",
        "OFT": "oft",
        "BOFT": "boft",
        "ROAD": "road",
        "LILY": "lily",
        "SHADOW": "shadow",
    }
)
"""peft_type to the module of this package that serves it; imported when first used."""


PROMPT_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "PREFIX_TUNING": "prompts",
        "CARTRIDGE": "prompts",
        "PROMPT_TUNING": "prompts",
        "P_TUNING": "prompts",
        "CPT": "prompts",
        "MULTITASK_PROMPT_TUNING": "multitask_prompt",
    }
)
"""Likewise, of the methods that put something in front of the prompt."""

ROUTER_METHOD = "arrow"
"""Likewise, of a router with adapters beside it."""


OTHER_METHODS: Mapping[str, str] = MappingProxyType({"MELORA": "melora", "DYLORA": "dylora", "LOTR": "lotr"})
"""Likewise, of methods that peft has not; their files look as peft's do."""

FLAGGED_METHODS: Mapping[str, str] = MappingProxyType({"use_mora": "mora"})
"""Methods of forks of peft whose configs say LORA, by the flag that tells."""


class Method(Protocol):
    """What a module of this package offers: one of the two, all tensors in fp32 on the CPU."""

    def compile_sites(self, checkpoint: Checkpoint, base: Base) -> Mapping[str, SiteForms]:
        """Forms by module path; every field and tensor of ``checkpoint`` used."""

    def compile_prompt(self, checkpoint: Checkpoint, base: Base) -> Prompt:
        """What stands in front of the prompt; every field and tensor of ``checkpoint`` used."""


def compile_adapter(
    folder: Path,
    base: Base,
    *,
    version: str,
    dtype: torch.dtype | None = None,
    chosen: Mapping[str, int] | None = None,
) -> CompiledAdapter:
    """Read the adapter in ``folder``, check it in full against ``base`` and reduce it to forms on the CPU.

    Args:
        version: the digest of its content.
        dtype: of the forms' tensors; None: the base's.
        chosen: what a request chose of the adapter's ``choices``.

    Raises:
        AdapterError: it cannot be read, does not fit the base, or cannot be served exactly; names the field or tensor.
    """
    names = present(folder)
    if DIFFERENCES in names:
        adapter = CompiledAdapter(version, "LT-SFT", compile_differences(folder, base))
    elif MODEL_CONFIG in names:
        adapter = CompiledAdapter(version, *compile_model(folder, base))
    elif CHAIN in names:
        adapter = CompiledAdapter(version, "CHAIN", compile_chain(folder, base, _compile_peft))
    elif is_hub(folder):
        adapter = CompiledAdapter(version, *compile_hub(folder, base))
    else:
        adapter = replace(_compile_peft(read_checkpoint(folder, chosen), base), version=version)
    dtype = dtype or base.dtype
    sites = {path: cast_forms(forms, dtype, path) for path, forms in adapter.sites.items()}
    return replace(adapter, sites=sites, prompt=cast_forms(adapter.prompt, dtype, "prompt_embeddings"))


def _compile_peft(checkpoint: Checkpoint, base: Base) -> CompiledAdapter:
    """What peft or a fork of it saved, in fp32, without a version."""
    peft_type = checkpoint.config.text("peft_type")
    if peft_type is None:
        raise AdapterFormatError("adapter_config.json names no peft_type; is it saved by peft?", param="peft_type")
    method = cast(Method, import_module(f"{__name__}.{_method_of(peft_type, checkpoint)}"))
    prompt = method.compile_prompt(checkpoint, base) if peft_type in PROMPT_METHODS else None
    sites = {} if prompt else method.compile_sites(checkpoint, base)
    saved = take_saved_modules(checkpoint, base, prompt)
    check_apart(saved, sites)
    take_base_copies(checkpoint, base)
    checkpoint.finish()
    choices, invocation = checkpoint.per_request.choices, checkpoint.per_request.invocation
    return CompiledAdapter("", peft_type, {**sites, **saved}, prompt, tuple(choices.values()), invocation)


def _method_of(peft_type: str, checkpoint: Checkpoint) -> str:
    """The module of this package that serves the adapter.

    Raises:
        AdapterUnsupported: there is none.
    """
    check_served(peft_type, checkpoint)
    if checkpoint.members:
        if peft_type != "LORA":
            raise AdapterUnsupported(f"a router of peft_type {show(peft_type)} is not served", param="peft_type")
        return ROUTER_METHOD
    flagged = next((name for flag, name in FLAGGED_METHODS.items() if checkpoint.config.flag(flag)), None)
    if flagged and peft_type == "LORA":
        return flagged
    modules = {**METHODS, **PROMPT_METHODS, **OTHER_METHODS}
    if peft_type not in modules:
        served = ", ".join(modules)
        raise AdapterUnsupported(f"peft_type {show(peft_type)} is not served; these are: {served}", param="peft_type")
    return modules[peft_type]
