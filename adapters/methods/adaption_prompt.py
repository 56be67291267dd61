"""LLaMA-Adapter (arXiv 2303.16199), peft's adaption prompt: a trained prefix in the last layers, behind a gate.

Every query q of such a layer also attends to the n vectors p of its prompt, in a softmax of their own:

    z = gate * softmax(q K^T / sqrt(d)) V    with K = W_k p + b_k and V = W_v p + b_v, neither rotated

Llama and Mistral send z through the output projection apart from the layer's own attention, so its bias is added twice;
GPT-2 adds z behind the projection. K and V follow from the base's weights and are computed here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.common import CONFIG_FIELDS, PREFIX, check_task
from weft.adapters.parts import GatedPrefix

MAX_LENGTH = 1 << 14

FIELDS = CONFIG_FIELDS | FieldTable(honoured=("target_modules", "adapter_len", "adapter_layers"))
"""Every field of peft 0.21.2's AdaptionPromptConfig."""


@dataclass(frozen=True)
class _Attention:
    """Names of an architecture's attention modules and of their projections.

    Attributes:
        fused: q, k and v come from one projection, in this order, and z is not projected.
    """

    name: str
    key: str
    value: str
    output: str
    fused: bool = False


_LLAMA = _Attention("self_attn", "k_proj", "v_proj", "o_proj")
ATTENTION: Mapping[str, _Attention] = MappingProxyType(
    {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": _Attention("attn", "c_attn", "c_attn", "c_proj", fused=True)}
)
"""By model type; peft knows no others."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    check_task(config)
    config.check(FIELDS)
    attention = ATTENTION.get(base.model_type)
    if attention is None:
        raise AdapterMismatch(
            f"peft makes adaption prompts for {', '.join(ATTENTION)} only; this is a {base.model_type} model",
            param="peft_type",
        )
    target = config.text("target_modules")
    if target not in (None, attention.name):
        raise AdapterMismatch(
            f"target_modules={show(target)} names no attention of a {base.model_type} model: {attention.name}",
            param="target_modules",
        )
    length = config.integer("adapter_len", 0, low=1, high=MAX_LENGTH)
    paths = [path for path in base.module_paths if path.endswith(f".{attention.name}")]
    layers = config.integer("adapter_layers", 0, low=1, high=len(paths))
    forms = {}
    for path in paths[-layers:]:
        prompt = checkpoint.tensors.take(f"{PREFIX}{path}.adaption_prompt", (1, length, base.hidden_size))[0].float()
        gate = checkpoint.tensors.take(f"{PREFIX}{path}.adaption_gate", (1,)).float()
        site = base.sites[f"{path}.{attention.output}"]
        forms[site.path] = _forms(base, attention, path, prompt, gate)
    return forms


def _forms(base: Base, attention: _Attention, path: str, prompt: torch.Tensor, gate: torch.Tensor) -> SiteForms:
    output = base.sites[f"{path}.{attention.output}"]
    if attention.fused:
        _, keys, values = _through(base, base.sites[f"{path}.{attention.key}"], prompt).chunk(3, dim=1)
    else:
        key, value = base.sites[f"{path}.{attention.key}"], base.sites[f"{path}.{attention.value}"]
        _check_heads(base, key, output)
        keys, values = _through(base, key, prompt), _through(base, value, prompt)
    prefix = GatedPrefix(keys * base.head_dim**-0.5, gate * values, projected=not attention.fused)
    return SiteForms(prefix=prefix, shift=base.bias(output) if prefix.projected else None)


def _through(base: Base, site: Site, x: torch.Tensor) -> torch.Tensor:
    """What the base's linear layer makes of ``x``."""
    bias = base.bias(site)
    y = x @ base.weight(site).T
    return y if bias is None else y + bias


def _check_heads(base: Base, key: Site, output: Site) -> None:
    """peft takes the size of a group of query heads from the widths of k_proj, and fails where that is another one."""
    heads = output.in_features // base.head_dim
    if key.in_features // key.out_features != heads // base.kv_heads:
        raise AdapterUnsupported(
            f"peft itself cannot run an adaption prompt where {heads} heads of {base.head_dim} do not make up the "
            f"hidden size of {key.in_features}",
            param="peft_type",
        )
