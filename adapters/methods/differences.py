"""Sparse differences from the base's parameters, as LT-SFT (arXiv 2110.07560) saves them and any such method can.

For each parameter the places in column-major order, each as a step from the last, and what is added there; and
parameters that were trained in full. FishMask, PaFi, Child-Tuning and diff pruning end in such differences too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import is_finite
from weft.adapters.config_fields import show
from weft.adapters.difference_file import read_difference_file
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported, BaseWeightsNeeded
from weft.adapters.forms import SiteForms
from weft.adapters.methods.places import sparse_update
from weft.adapters.parts import TokenRows

MAX_PLACES = (1 << 31) - 1
"""The reference counts places in 32 bits."""


def compile_differences(folder: Path, base: Base) -> dict[str, SiteForms]:
    """Forms by module path of the file in ``folder``, in fp32 on the CPU.

    Raises:
        AdapterError: it cannot be read, or does not fit the base; names the parameter.
    """
    forms = parameter_forms(_differences(folder, base), base)
    if not forms:
        raise AdapterFormatError("the file changes no parameter")
    return {path: form for path, form in forms.items() if form.parts()}


def parameter_forms(differences: Iterable[tuple[str, torch.Tensor]], base: Base) -> dict[str, SiteForms]:
    """Forms by module path of parameters' names and what is added to each, as it is stored, fp32.

    Raises:
        AdapterUnsupported: a parameter is none of a linear layer, a norm or the embedding.
    """
    forms: dict[str, SiteForms] = {}
    for name, difference in differences:
        path, _, which = name.rpartition(".")
        site = base.module(path)
        if site is None or which not in ("weight", "bias"):
            raise AdapterUnsupported(
                f"{show(name)} is no parameter of a linear layer, a norm or the embedding", param=name[:200]
            )
        if base.tied and path == base.head:
            raise AdapterUnsupported(
                f"{show(name)} is the embedding's weight too; name it by the embedding", param=name[:200]
            )
        forms[path] = _with(forms.get(path, SiteForms()), site, which, difference, base)
        if site.kind == "embedding" and base.tied and base.head is not None:
            rows = _rows(site, difference, base, 1.0)
            forms[base.head] = replace(forms.get(base.head, SiteForms()), rows=rows)
    return forms


def _with(form: SiteForms, site: Site, which: str, difference: torch.Tensor, base: Base) -> SiteForms:
    if site.kind == "norm":
        own = base.weight(site) if which == "weight" else base.bias(site)
        assert own is not None, "only parameters of the base are changed"
        return replace(form, weight=own + difference) if which == "weight" else replace(form, bias=own + difference)
    if which == "bias":
        return replace(form, shift=difference)
    if site.kind == "embedding":
        return replace(form, rows=_rows(site, difference, base, base.embedding_scale))
    update = difference.T if site.kind == "conv1d" else difference
    if 2 * int(update.count_nonzero()) > update.numel():  # dense in any case, and places would be many
        return replace(form, delta=update)
    flat = update.flatten()
    places = flat.nonzero()[:, 0]
    few = sparse_update(base, site, places, flat[places], f"{site.path}.weight")
    return replace(form, delta=few.delta, sparse=few.sparse)


def _rows(site: Site, difference: torch.Tensor, base: Base, scale: float) -> TokenRows:
    """The tokens whose vectors change, and those vectors."""
    ids = difference.any(dim=1).nonzero()[:, 0]
    return TokenRows(ids, (base.weight(site)[ids] + difference[ids]) * scale)


def _differences(folder: Path, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter's name and what is added to it, as it is stored, fp32."""
    content = read_difference_file(folder)
    parts = {part: content.pop(part, {}) for part in ("diffs", "abs")}
    if content or not all(isinstance(part, dict) for part in parts.values()):
        raise AdapterFormatError(f"the file must hold dicts named diffs and abs alone, not {show(content)}")
    for part, entries in parts.items():
        for name, entry in entries.items():
            if not isinstance(name, str) or name not in base.parameters:
                raise AdapterMismatch(f"the base has no parameter {show(name)}", param=str(name)[:200])
            if part == "abs" and name in parts["diffs"]:
                raise AdapterFormatError(f"{show(name)} is among diffs and abs", param=name[:200])
            own = base.parameters[name]
            yield name, _decoded(entry, name, own) if part == "diffs" else _minus(entry, name, own)


def _minus(whole: object, name: str, own: torch.Tensor) -> torch.Tensor:
    if own.is_meta:
        raise BaseWeightsNeeded(f"{show(name)} can only be compared with a base that is loaded", param=name)
    return _checked(whole, name, tuple(own.shape)) - own.cpu().float()


def _decoded(entry: object, name: str, own: torch.Tensor) -> torch.Tensor:
    """The dense difference of one parameter; its size is the base's before anything is allocated."""
    if not isinstance(entry, dict) or entry.keys() != {"size", "index_steps", "values"}:
        raise AdapterFormatError(f"{show(name)} must have size, index_steps and values", param=name[:200])
    shape, steps = tuple(own.shape), entry["index_steps"]
    if not isinstance(entry["size"], tuple | list) or tuple(entry["size"]) != shape or own.numel() > MAX_PLACES:
        raise AdapterMismatch(
            f"{show(name)} has size {show(entry['size'])}, the base's {list(shape)}", param=name[:200]
        )
    if not isinstance(steps, list) or not all(type(step) is int and 0 <= step <= own.numel() for step in steps):
        raise AdapterFormatError(
            f"index_steps of {show(name)} must be a list of integers in its size", param=name[:200]
        )
    values = _checked(entry["values"], name, (len(steps),))
    places = torch.tensor(steps, dtype=torch.int64).cumsum(0)
    if len(steps) and (0 in steps[1:] or int(places[-1]) >= own.numel()):
        raise AdapterFormatError(f"index_steps of {show(name)} leave its size or name a place twice", param=name[:200])
    columns_first = torch.zeros(shape[::-1])
    columns_first.view(-1)[places] = values
    return columns_first.permute(*reversed(range(len(shape))))


def _checked(tensor: object, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.is_sparse:
        raise AdapterFormatError(f"{show(name)} must hold a tensor of weights", param=name[:200])
    if tuple(tensor.shape) != shape:
        raise AdapterMismatch(f"{show(name)} has shape {list(tensor.shape)}, not {list(shape)}", param=name[:200])
    # A view may claim more than its storage holds.
    result = tensor.detach().float().contiguous()
    if not is_finite(result):
        raise AdapterFormatError(f"{show(name)} holds NaN or infinity", param=name[:200])
    return result
