"""Chains of LoRA (COLA, arXiv 2401.04151): W + Σ_t s_t B_t A_t, each link trained on the base and the links before it.

A chain is a folder with ``adapter_chain.json``, ``{"links": ["stage-1", "stage-2"]}``, and a sub-folder for each link
as peft saved it. Updates add up whatever they were trained on; what a link trained in full (biases, modules to save,
tokens) is as the last one left it. A link whose update follows from the weight it was trained on can only be the
first; and one that adapts the embedding or the head behind another must be saved with ``save_embedding_layers=False``,
or it holds a weight that is not the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint, read_checkpoint
from weft.adapters.config_fields import FieldTable, parse_config, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.files import CHAIN, CONFIG, open_regular, present, size_limit
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.methods.common import PREFIX
from weft.adapters.methods.factors import product
from weft.adapters.methods.lora_factors import RESIDUAL_INITS
from weft.adapters.parts import LowRank, TokenRows

FIELDS = FieldTable(honoured=("links",))

SUMMED = {"low_rank", "shift", "delta", "rows", "weight", "bias"}
"""Fields of forms that have a meaning behind those of another link."""

Compile = Callable[[Checkpoint, Base], CompiledAdapter]


def compile_chain(folder: Path, base: Base, compile_link: Compile) -> dict[str, SiteForms]:
    """Forms by module path of all links together, in fp32 on the CPU.

    Args:
        compile_link: reads one link in full.

    Raises:
        AdapterError: a link cannot be read, does not fit the base, or cannot be served behind the others exactly.
    """
    forms: dict[str, SiteForms] = {}
    for name in _links(folder):
        checkpoint = read_checkpoint(folder / name)
        if checkpoint.config.text("peft_type") != "LORA":
            raise AdapterUnsupported(f"the link {show(name)} is no LoRA, of which chains are made", param="peft_type")
        if forms:
            _check_independent(checkpoint, name)
        link = _Link(name, checkpoint, compile_link(checkpoint, base))
        _check_untied(link, base)
        _check_copies(link, forms)
        forms |= {path: link.behind(forms.get(path), path) for path in link.adapter.sites}
    return {path: _cheapest(form, path, base) for path, form in forms.items()}


@dataclass(frozen=True)
class _Link:
    """One link, read in full."""

    name: str
    checkpoint: Checkpoint
    adapter: CompiledAdapter

    def saves(self, path: str, what: str) -> bool:
        """Whether the file holds ``what`` of the module as it is, not a factor of its update."""
        return f"{PREFIX}{path}.{what}" in self.checkpoint.tensors

    def behind(self, before: SiteForms | None, path: str) -> SiteForms:
        """What is at a site once this link has followed ``before``."""
        own = self.adapter.sites[path]
        odd = next((name for form in (own, before) if form is not None for name in _present(form) - SUMMED), None)
        if odd is not None:
            raise self.refused(f"does more at {show(path)} than a sum can hold ({odd}), as DoRA does", "use_dora")
        if before is None or self.saves(path, "weight"):  # replaced by a module that was trained in full
            return own
        if before.rows is not None and own.low_rank is not None:
            raise self.refused(f"adapts {show(path)}, of which a link before it has trained rows", "target_modules")
        # A bias that was trained takes in whatever was added to it before.
        whole = own.bias is not None or self.saves(path, "bias") or self.saves(path, "base_layer.bias")
        return SiteForms(
            low_rank=_stacked(before.low_rank, own.low_rank),
            shift=own.shift if whole else _sum(before.shift, own.shift),
            delta=before.delta,
            rows=_replaced(before.rows, own.rows),
            weight=before.weight if own.weight is None else own.weight,
            bias=before.bias if own.bias is None else own.bias,
        )

    def refused(self, why: str, param: str) -> AdapterUnsupported:
        return AdapterUnsupported(f"the link {show(self.name)} {why}", param=param)


def _links(folder: Path) -> list[str]:
    """The links' names, in order: folders inside of this one, which holds no others."""
    with open_regular(folder, CHAIN) as file:
        config = parse_config(file.read(size_limit(CHAIN)))
    config.check(FIELDS)
    links = config.names("links")
    config.finish()
    if not isinstance(links, tuple) or not links or len(set(links)) != len(links):
        raise AdapterFormatError(f"links must be a list of different folders, got {show(links)}", param="links")
    names = present(folder)
    found = {name.rpartition("/")[0] for name in names} - {""}
    for link in links:
        if f"{link}/{CHAIN}" in names:
            raise AdapterUnsupported(f"the link {show(link)} is a chain itself; name its links", param="links")
        if f"{link}/{CONFIG}" not in names:
            raise AdapterFormatError(f"the chain names {show(link)}, which is no folder of an adapter", param="links")
    if found - set(links):
        raise AdapterMismatch(f"the chain does not name the folder {show(min(found - set(links)))}", param="links")
    return list(links)


def _check_independent(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a link behind others whose update follows from the weight it was trained on."""
    config = checkpoint.config
    init = config.value("init_lora_weights", True)
    fields = {
        "init_lora_weights": isinstance(init, str) and init in RESIDUAL_INITS,
        "kasa_config": config.value("kasa_config", None) is not None,
        "use_dora": config.flag("use_dora"),
    }
    for field, dependent in fields.items():
        if dependent:
            raise AdapterUnsupported(
                f"the link {show(name)} depends on the weights that the links before it made ({field}); only the first "
                "link may",
                param=field,
            )


def _check_untied(link: _Link, base: Base) -> None:
    """Refuse what touches an embedding and the head tied to it: merging one of them into the weight changes both."""
    for site in (base.embedding.path if base.embedding else None, base.head):
        if base.tied and site in link.adapter.sites:
            raise link.refused(f"adapts {show(site)}, whose weight embedding and head share", "target_modules")
    if link.adapter.invocation:
        raise link.refused("is an activated LoRA, which cannot be merged for the next", "alora_invocation_tokens")


def _check_copies(link: _Link, forms: Mapping[str, SiteForms]) -> None:
    """Refuse a copy of a base's weight that an earlier link changed: loaded behind it, it takes the change back."""
    for path in forms:
        copied = link.saves(path, "base_layer.weight") or (
            path not in link.adapter.sites and link.saves(path, "weight")
        )
        if copied:
            raise link.refused(f"repeats the base's weight of {show(path)}, which a link before it changed", path)


def _present(form: SiteForms) -> set[str]:
    return {name for name, value in vars(form).items() if value is not None}


def _stacked(before: LowRank | None, own: LowRank | None) -> LowRank | None:
    """The sum of two updates, their ranks side by side; of experts, those of one expert together."""
    if before is None or own is None:
        return own or before
    count = own.experts
    a = torch.cat([factor.a.unflatten(0, (count, -1)) for factor in (before, own)], dim=1).flatten(0, 1)
    b = torch.cat([factor.b.unflatten(1, (count, -1)) for factor in (before, own)], dim=2).flatten(1)
    return LowRank(a, b, experts=count)


def _sum(before: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor | None:
    if before is None or own is None:
        return before if own is None else own
    return before + own


def _replaced(before: TokenRows | None, own: TokenRows | None) -> TokenRows | None:
    """The rows of both; where both have one, the later."""
    if before is None or own is None:
        return own or before
    kept = ~torch.isin(before.ids, own.ids)
    ids = torch.cat([before.ids[kept], own.ids])
    order = ids.argsort()
    return TokenRows(ids[order], torch.cat([before.vectors[kept], own.vectors])[order])


def _cheapest(form: SiteForms, path: str, base: Base) -> SiteForms:
    """A dense update where the ranks of all links together take more."""
    site, update = base.sites.get(path), form.low_rank
    if site is None or update is None:
        return form
    if form.delta is not None:
        return replace(form, low_rank=None, delta=form.delta + update.b @ update.a)
    best = product(update.b, update.a, site)
    return replace(form, low_rank=best.low_rank, delta=best.delta)
