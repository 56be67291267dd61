"""What the loaders of peft's methods share: fields every config has, tensor names, casts, copies of base weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint, is_finite
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterTooLarge, AdapterUnsupported, BaseWeightsNeeded
from weft.adapters.methods.targets import Selector, targeted_sites

T = TypeVar("T")

PREFIX = "base_model.model."
"""Before the module's path in every tensor name peft writes."""

DECOMPOSED = (
    "its vectors belong to the decomposition of the very weight it was trained on, which peft cannot make of this"
)
"""Why methods between the singular vectors of the base's weight are not served on a quantised one."""

CONFIG_FIELDS = FieldTable(
    honoured=("peft_type", "task_type"),
    ignored={
        "auto_mapping": "names the classes the adapter was trained with",
        "base_model_name_or_path": "a name says little; the base is checked by its modules and their shapes",
        "inference_mode": "freezes the weights",
        "peft_version": "every field is checked whatever wrote it",
        "revision": "of base_model_name_or_path",
    },
)
"""Fields of every config."""

COMMON_FIELDS = CONFIG_FIELDS | FieldTable(honoured=("modules_to_save",))
"""Those and ``modules_to_save``, which the caller of the loaders honours."""


def check_task(config: ConfigFields) -> None:
    """Refuse adapters that were not trained for a causal language model."""
    task = config.text("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterUnsupported(f"task_type={show(task)} is not served: only CAUSAL_LM generates", param="task_type")


def method_sites(
    checkpoint: Checkpoint,
    base: Base,
    fields: FieldTable,
    defaults: Mapping[str, Selector],
    *,
    embeddings: bool = False,
    optional: bool = False,
) -> list[Site]:
    """The sites a config adapts, once all its fields were checked: how the loaders of linear methods begin.

    Args:
        fields: every field the method's config can have.
        defaults: the method's own targets by model type, for a config that names none.
        embeddings: the method adapts the token embedding too.
        optional: the config may target no module at all.
    """
    check_task(checkpoint.config)
    checkpoint.config.check(fields)
    sites = targeted_sites(checkpoint.config, base, defaults, embeddings=embeddings, optional=optional)
    names = checkpoint.config.names("modules_to_save") or ()
    endings = (names,) if isinstance(names, str) else names
    for site in sites:
        if endings and f"{PREFIX}{site.path}".endswith(endings):
            raise AdapterUnsupported(
                f"modules_to_save replaces {show(site.path)}, which is also adapted", param="modules_to_save"
            )
    return sites


def refuse_quantized(sites: Sequence[Site], base: Base, method: str, why: str) -> None:
    """Of methods that peft cannot run on a quantised linear, and whose meaning there is not that of its weight.

    Raises:
        AdapterUnsupported: a target is quantised.
    """
    for site in sites:
        if site.path in base.quantized:
            raise AdapterUnsupported(
                f"target_modules selects {show(site.path)}, which is quantised; {method} is served on unquantised "
                f"layers only: {why}",
                param="target_modules",
            )


def site_tensor(checkpoint: Checkpoint, site: Site, part: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One of a site's tensors, in fp32, e.g. ``part="hada_w1_a"``.

    Raises:
        AdapterMismatch: it is missing, or of another shape.
    """
    return checkpoint.tensors.take(f"{PREFIX}{site.path}.{part}", shape).float()


def check_memory(base: Base, numbers: int) -> None:
    """Refuse an adapter of so many numbers before they are made, where it could never fit.

    Few numbers of a file may stand for updates as large as the base. What an adapter takes in full is checked once it
    is there; this spares the memory.

    Raises:
        AdapterTooLarge: saying what it would take.
    """
    needed = numbers * base.dtype.itemsize
    if base.adapter_memory is not None and needed > base.adapter_memory:
        raise AdapterTooLarge(
            f"the adapter needs at least {needed} bytes of adapter memory, of {base.adapter_memory} there are; raise "
            "--adapter-memory",
            param="adapter_memory",
        )


def check_dense(base: Base, sites: Iterable[Site]) -> None:
    """The same, of dense updates at these sites."""
    check_memory(base, sum(site.in_features * site.out_features for site in sites))


def cast_forms(forms: T, dtype: torch.dtype, name: str) -> T:
    """The same forms, or prompt, or part of them, in ``dtype`` and contiguous; integers stay as they are.

    Args:
        name: what they are called in an error.

    Raises:
        AdapterFormatError: a value is beyond the range of ``dtype``.
    """
    value: Any = forms
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        value = cast_finite(value, dtype, name)
    elif isinstance(value, tuple):
        value = tuple(cast_forms(item, dtype, name) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        value = replace(value, **{part: cast_forms(item, dtype, f"{name} ({part})") for part, item in own.items()})
    result: T = value
    return result


def take_biases(checkpoint: Checkpoint, base: Base, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """The trained biases of a config with ``bias="all"`` or ``"lora_only"``, fp32 by path; empty with ``"none"``.

    peft saves them whole, under the adapted module's ``base_layer`` or under the module itself. It looks at the end of
    ``lora_only`` alone, because every method has its own word before it.

    Raises:
        AdapterUnsupported: a bias that is neither a linear layer's nor a norm's was trained.
    """
    mode = checkpoint.config.value("bias", "none")
    if mode == "none":
        return {}
    targeted = {site.path for site in sites}
    if mode != "all" and not (isinstance(mode, str) and mode.endswith("_only")):
        raise AdapterFormatError(f"bias must be none, all or the method's ..._only, got {show(mode)}", param="bias")
    biases = {}
    for name in checkpoint.tensors.left:
        path = name.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
        if not name.endswith(".bias") or ".lora_" in name:
            continue
        site = base.module(path)
        if site is None or not site.has_bias:
            raise AdapterUnsupported(f"{show(name)} replaces the bias of another kind of module", param="bias")
        if mode == "all" or path in targeted:
            biases[path] = checkpoint.tensors.take(name, (site.out_features,)).float()
    return biases


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
        if parameter is not None and name.startswith(PREFIX):
            take_base_copy(checkpoint, name, parameter)


def take_base_copy(checkpoint: Checkpoint, name: str, parameter: torch.Tensor) -> None:
    """Take a tensor that repeats ``parameter`` of the base; see ``take_base_copies``."""
    copy = checkpoint.tensors.take(name)
    if parameter.is_meta:
        raise BaseWeightsNeeded(f"{show(name)} can only be compared with a base that is loaded", param=name)
    if copy.shape != parameter.shape or not torch.equal(copy.to(parameter.dtype), parameter.cpu()):
        raise AdapterUnsupported(
            f"{show(name)} replaces a weight of the base by another one, which is not served", param=name
        )
