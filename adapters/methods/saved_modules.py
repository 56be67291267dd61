"""Modules of the base that an adapter has trained in full, whatever its method: peft's ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.forms import Prompt, SiteForms, SoftPrompt
from weft.adapters.methods.common import PREFIX
from weft.adapters.parts import TokenRows

PROMPT_PREFIX = "base_model."
"""Before the module's path where peft puts something in front of the prompt and wraps nothing else."""


def take_saved_modules(checkpoint: Checkpoint, base: Base, prompt: Prompt | None = None) -> dict[str, SiteForms]:
    """The modules that ``modules_to_save`` replaces, by path: norms, the token embedding, and linear layers as the
    difference they make.

    peft replaces every module whose path ends with one of the names, dot or no dot, and saves its tensors whole; a name
    that no module has changes nothing.

    Args:
        prompt: what the adapter puts in front of the prompt.

    Raises:
        AdapterUnsupported: such a module is of another kind, inside of another one, or changes the prompt itself.
        AdapterMismatch: one of its tensors is missing.
    """
    names = checkpoint.config.names("modules_to_save")
    if not names:
        return {}
    endings = (names,) if isinstance(names, str) else names
    prefix = PROMPT_PREFIX if prompt else PREFIX
    tops = [path for path in base.module_paths if f"{prefix}{path}".rstrip(".").endswith(endings)]
    nested = next((path for path in tops for top in tops if path != top and _inside(path, top)), None)
    if nested is not None:
        raise _refused(f"replaces {show(nested)} and a module around it")
    forms = {}
    for path in (path for top in tops for path in base.module_paths if path == top or _inside(path, top)):
        site = base.module(path)
        if site is not None:
            if isinstance(prompt, SoftPrompt) and path != base.head:
                raise _refused(f"replaces {show(path)}, of which the keys and values of the soft prompt would depend")
            forms[path] = _saved_module(checkpoint, base, site, prefix)
        elif f"{path}.weight" in base.parameters:
            raise _refused(f"replaces {show(path)}, which is no linear layer, norm or token embedding")
    if forms and base.tied and checkpoint.config.value("ensure_weight_tying", False):
        raise _refused("with ensure_weight_tying is not served where the base ties its head")
    return forms


def check_apart(saved: Mapping[str, SiteForms], adapted: Iterable[str]) -> None:
    """Raise AdapterUnsupported where a module is both replaced and adapted."""
    both = next((path for path in adapted if path in saved), None)
    if both is not None:
        raise _refused(f"replaces {show(both)}, which is also adapted")


def _inside(path: str, top: str) -> bool:
    return not top or path.startswith(f"{top}.")


def _refused(why: str) -> AdapterUnsupported:
    return AdapterUnsupported(f"modules_to_save {why}", param="modules_to_save")


def _saved_module(checkpoint: Checkpoint, base: Base, site: Site, prefix: str) -> SiteForms:
    if site.path in base.quantized:
        raise _refused(f"replaces {show(site.path)}, which is quantised; peft cannot load it there either")

    def saved(name: str) -> torch.Tensor:
        shape = tuple(base.parameters[f"{site.path}.{name}"].shape)
        return checkpoint.tensors.take(f"{prefix}{site.path}.{name}", shape).float()

    weight, bias = saved("weight"), saved("bias") if site.has_bias else None
    if site.kind == "norm":
        return SiteForms(weight=weight, bias=bias)
    if site.kind == "embedding":
        return SiteForms(rows=TokenRows(torch.arange(site.in_features), weight * base.embedding_scale))
    own = base.bias(site)
    weight = weight.T if site.kind == "conv1d" else weight
    return SiteForms(delta=weight - base.weight(site), shift=None if bias is None or own is None else bias - own)
