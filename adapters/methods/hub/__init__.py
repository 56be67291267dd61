"""Adapters of the AdapterHub library (``adapters`` 1.3.0), whose folders look like peft's and are not.

A folder is the library's if it holds ``pytorch_adapter.bin`` or ``adapter.safetensors``, or ``adapter_setup.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weft.adapters.base import Base
from weft.adapters.checkpoint import read_checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.files import HUB_WEIGHTS, SETUP, present
from weft.adapters.forms import Prompt, SiteForms
from weft.adapters.methods.hub.around import check_head, check_interface
from weft.adapters.methods.hub.bottleneck import compile_bottlenecks
from weft.adapters.methods.hub.fusion import compile_fusion
from weft.adapters.methods.hub.lora import compile_lora
from weft.adapters.methods.hub.prefix import compile_prefix
from weft.adapters.methods.hub.saved import Saved, read_envelope

UNION = FieldTable(honoured=("architecture", "configs"))
OF_PREFIXES = {"joint", "prefix_gate"}
ARCHITECTURES = ("bottleneck", "lora", "prefix_tuning", "union")


def is_hub(folder: Path) -> bool:
    """Whether the adapter in ``folder`` was saved by the AdapterHub library."""
    return any(name in (SETUP, *HUB_WEIGHTS) for name in present(folder))


def compile_hub(folder: Path, base: Base) -> tuple[str, Mapping[str, SiteForms], Prompt | None]:
    """How the adapter was trained, its forms by path, and what stands in front of the prompt; all in fp32.

    Raises:
        AdapterError: it cannot be read, does not fit the base, or cannot be served exactly.
    """
    names = present(folder)
    check_interface(folder, names, base)
    check_head(folder, names, base)
    if SETUP in names:
        return "AdapterHub fusion", compile_fusion(folder, base), None
    checkpoint = read_checkpoint(folder)
    saved, architecture = read_envelope(checkpoint, base)
    sites: dict[str, SiteForms] = {}
    prompt: Prompt | None = None
    for part in _parts(saved, architecture):
        forms, own = _compile(part)
        if own is not None and prompt is not None:
            raise _twice()
        sites |= {path: _together(sites.get(path, SiteForms()), form) for path, form in forms.items()}
        prompt = own or prompt
        part.config.finish()
    checkpoint.finish()
    return f"AdapterHub {architecture}", sites, prompt


def _together(one: SiteForms, other: SiteForms) -> SiteForms:
    """What two members of a union do at the same site: only a gated prefix touches nothing of what another one does."""
    mine, others = ({name: form for name, form in vars(forms).items() if form is not None} for forms in (one, other))
    if mine.keys() & others.keys() or not (mine.keys() <= OF_PREFIXES or others.keys() <= OF_PREFIXES):
        raise _twice()
    return replace(one, **others)


def _twice() -> AdapterUnsupported:
    return AdapterUnsupported("configs adapts something twice, which the library refuses too", param="configs")


def _parts(saved: Saved, architecture: str) -> list[Saved]:
    """One for each method: the members of a union, or the adapter itself."""
    if architecture != "union":
        return [saved]
    saved.config.check(UNION)
    configs = saved.config.value("configs", None)
    if not isinstance(configs, list) or not configs or not all(isinstance(config, dict) for config in configs):
        raise AdapterFormatError(f"configs must be a list of configs, got {show(configs)}", param="configs")
    saved.config.finish()
    return [replace(saved, config=ConfigFields(config)) for config in configs]


def _compile(part: Saved) -> tuple[dict[str, SiteForms], Prompt | None]:
    architecture = part.config.text("architecture") or "bottleneck"
    if architecture == "bottleneck":
        return compile_bottlenecks(part), None
    if architecture == "lora":
        return compile_lora(part), None
    if architecture == "prefix_tuning":
        prefix = compile_prefix(part)
        return (prefix, None) if isinstance(prefix, dict) else ({}, prefix)
    raise AdapterUnsupported(
        f"architecture={show(architecture)} is not served; these are: {', '.join(ARCHITECTURES)}", param="architecture"
    )
