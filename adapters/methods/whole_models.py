"""Models trained in full, as what they differ in from the base; among them ReLoRA's (arXiv 2307.05695).

The folder is a model's: ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, unsharded. ReLoRA trains
with LoRA, merges it into the weights and begins anew; its ``save_pretrained`` (Guitaricet/relora) writes the model as
it is at the moment, with A and B of the update under way beside the weights, and ``relora_config.json``. There
y = W x + b + s B A x with s = α / r, or tanh of a trained number. What equals the base takes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weft.adapters.base import FREQUENCIES, Base, Site
from weft.adapters.checkpoint import Tensors, open_tensors
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, parse_config, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported, BaseWeightsNeeded
from weft.adapters.files import MODEL_CONFIG, MODEL_WEIGHTS, RELORA, open_regular, present, size_limit
from weft.adapters.forms import SiteForms
from weft.adapters.methods.common import check_memory
from weft.adapters.methods.differences import parameter_forms
from weft.adapters.methods.factors import MAX_RANK, product

RELORA_FIELDS = FieldTable(
    honoured=("r", "lora_alpha", "target_modules", "trainable_scaling", "keep_original"),
    ignored={
        "keep_original_weights": "what the weights were before training",
        "lora_dropout": "no dropout at inference",
        "use_double_quant": "only read with quantize, which is refused",
    },
    neutral={
        "lora_only": Neutral("its layers have no weight beside their update"),
        "quantize": Neutral("its weights are packed"),
    },
)
"""Every field of ReLoRaConfig, and the one it had before."""

WITHOUT_EFFECT = {
    "_name_or_path": "a name",
    "architectures": "the model is the base's",
    "bos_token_id": "requests are tokens",
    "dtype": "weights are served in the base's",
    "torch_dtype": "its older name",
    "eos_token_id": "the base says where an answer ends",
    "initializer_range": "how weights were initialised",
    "max_position_embeddings": "the base's limit stands; learnt positions are tensors of a shape",
    "max_sequence_length": "the same in ReLoRA's configurations",
    "pad_token_id": "nothing is padded",
    "transformers_version": "of the writer",
    "use_cache": "the engine has its own",
}
"""Fields of a model's configuration in which it may differ from the base, and why."""


def compile_model(folder: Path, base: Base) -> tuple[str, dict[str, SiteForms]]:
    """How the model in ``folder`` was trained, as far as it says, and its forms by module path, fp32 on the CPU.

    Raises:
        AdapterError: it cannot be read, or is no model of the base's architecture; names the field or tensor.
    """
    if base.quantized:
        raise AdapterUnsupported("a model trained in full is not served on a quantised base", param=MODEL_CONFIG)
    names = present(folder)
    weights = [name for name in names if name in MODEL_WEIGHTS]
    if len(weights) != 1:
        raise AdapterFormatError(f"the folder holds weights twice: {', '.join(weights)}", param=weights[0])
    _check_architecture(_read(folder, MODEL_CONFIG), base)
    tensors = open_tensors(folder, weights[0])
    updates = _updates(_read(folder, RELORA), tensors, base) if RELORA in names else {}
    forms = parameter_forms(_differences(tensors, base), base)
    _take_frequencies(tensors, base)
    tensors.finish()
    for path, update in updates.items():
        forms[path] = update.beside(forms.get(path, SiteForms()))
    if not forms:
        raise AdapterFormatError("the model is the base: none of its weights differs", param=weights[0])
    return ("RELORA" if RELORA in names else "FULL"), forms


@dataclass(frozen=True)
class _Update:
    """The update under way at one linear; the scale is in B."""

    site: Site
    a: torch.Tensor
    b: torch.Tensor

    def beside(self, form: SiteForms) -> SiteForms:
        """With what the weight differs by: in one dense update, if there is one anyway."""
        if form.delta is not None:
            return replace(form, delta=form.delta + self.b @ self.a)
        best = product(self.b, self.a, self.site)
        return replace(form, low_rank=best.low_rank, delta=best.delta)


def _read(folder: Path, name: str) -> ConfigFields:
    with open_regular(folder, name) as file:
        return parse_config(file.read(size_limit(name)))


def _check_architecture(fields: ConfigFields, base: Base) -> None:
    """Refuse a configuration that computes something else than the base's."""
    assert base.config is not None, "the base of an adapter is a model"
    values, own = fields.everything(), base.config.to_dict()
    if values.get("model_type") != base.model_type:
        raise AdapterMismatch(
            f"model_type is {show(values.get('model_type'))}, not {base.model_type}", param="model_type"
        )
    # Numbers first: a configuration makes lists as long as they say.
    for name, value in values.items():
        if name not in WITHOUT_EFFECT and isinstance(value, int) and getattr(base.config, name, value) != value:
            raise _another(name, value, getattr(base.config, name))
    try:
        full = type(base.config).from_dict(values).to_dict()
    except Exception as error:  # transformers' configurations raise errors of many kinds
        raise AdapterFormatError(
            f"{MODEL_CONFIG} is no configuration: {show(str(error))}", param=MODEL_CONFIG
        ) from error
    for name in sorted((full.keys() | own.keys()) - WITHOUT_EFFECT.keys()):
        if full.get(name) != own.get(name):
            raise _another(name, full.get(name), own.get(name))


def _another(name: str, value: object, own: object) -> AdapterMismatch:
    return AdapterMismatch(
        f"{show(name)} is {show(value)} in {MODEL_CONFIG}, but {show(own)} in the base's", param=name[:200]
    )


def _differences(tensors: Tensors, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter that the model has another value of, and what is added to the base's, fp32."""
    numbers = 0
    for name, own in base.parameters.items():
        path = name.rpartition(".")[0]
        tied = base.tied and path == base.head
        if tied and name not in tensors:
            continue  # saved once, by the embedding's name
        saved = tensors.take(name, tuple(own.shape))
        if own.is_meta:
            raise BaseWeightsNeeded(f"{show(name)} can only be compared with a base that is loaded", param=name)
        if tied:
            _check_tied(tensors, name, saved, base)
        elif not torch.equal(saved.to(own.dtype), own.cpu()):
            difference = saved.float() - own.cpu().float()
            numbers += int(difference.count_nonzero())
            check_memory(base, numbers)
            yield name, difference


def _check_tied(tensors: Tensors, name: str, saved: torch.Tensor, base: Base) -> None:
    assert base.embedding is not None, "every base has an embedding"
    if not torch.equal(saved, tensors.take(f"{base.embedding.path}.weight", tuple(saved.shape))):
        raise AdapterMismatch(f"{show(name)} is not the embedding's weight, to which the base ties it", param=name)


def _updates(fields: ConfigFields, tensors: Tensors, base: Base) -> Mapping[str, _Update]:
    """The LoRA under way, by path: of every linear with one of ``target_modules`` anywhere in its path."""
    fields.check(RELORA_FIELDS)
    if not fields.flag("keep_original", True):  # the older name of lora_only's opposite
        raise AdapterUnsupported("keep_original=False is not served: no weight is there", param="keep_original")
    rank = fields.integer("r", 128, low=1, high=MAX_RANK)
    alpha, trained = fields.number("lora_alpha", 32), fields.flag("trainable_scaling")
    targets = fields.names("target_modules") or ()
    fields.finish()
    keys = (targets,) if isinstance(targets, str) else targets
    updates = {}
    for path, site in base.sites.items():
        if site.kind != "linear" or not any(key in path for key in keys):
            continue
        a = tensors.take(f"{path}.lora_A.weight", (rank, site.in_features)).float()
        b = tensors.take(f"{path}.lora_B.weight", (site.out_features, rank)).float()
        scale = tensors.take(f"{path}.scaling", (1,)).float().tanh() if trained else alpha / rank
        if bool(a.any()) and bool(b.any()):
            updates[path] = _Update(site, a, b * scale)
    return updates


def _take_frequencies(tensors: Tensors, base: Base) -> None:
    """Take the rotary frequencies that old versions of transformers save in every layer, where they are the base's."""
    for name in tensors.left:
        if base.frequencies is None or not name.endswith(f".{FREQUENCIES}"):
            continue
        saved, own = tensors.take(name, tuple(base.frequencies.shape)).float(), base.frequencies.float().cpu()
        # A checkpoint in 16 bits has rounded them.
        if not torch.allclose(saved, own, rtol=4 * torch.finfo(base.dtype).eps, atol=0):
            raise AdapterMismatch(f"{show(name)} is not the base's", param=name[:200])
