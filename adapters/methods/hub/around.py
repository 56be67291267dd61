"""What lies beside an adapter of the AdapterHub library: the model's head, and which modules were adapted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import open_tensors
from weft.adapters.config_fields import FieldTable, parse_config, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported, BaseWeightsNeeded
from weft.adapters.files import HEAD_WEIGHTS, INTERFACE, open_regular, size_limit

INTERFACE_FIELDS = FieldTable(honoured=("interface", "model_type"), ignored={"version": "of the library"})
ATTACHED: Mapping[str, str | None] = MappingProxyType(
    {
        "attn_k_proj": "k_proj",
        "attn_o_proj": "o_proj",
        "attn_q_proj": "q_proj",
        "attn_qkv_proj": None,
        "attn_v_proj": "v_proj",
        "layer_cross_attn": None,
        "layer_intermediate_proj": "mlp.up_proj",
        "layer_ln_1": None,
        "layer_ln_2": None,
        "layer_output_proj": "mlp.down_proj",
        "layer_pre_cross_attn": None,
        "layer_pre_ffn": "post_attention_layernorm",
        "layer_pre_self_attn": "input_layernorm",
        "layer_self_attn": "self_attn",
        "model_layers": "layers",
    }
)
"""The library's own interface to Qwen2 and Qwen3, which it has no classes for."""

UNUSED = ("adapter_methods", "base_model", "model_embeddings")
"""Fields of the interface without an effect on the methods that are served."""


def check_interface(folder: Path, names: list[str], base: Base) -> None:
    """Refuse an adapter that was attached to other modules than the library's own interface names.

    The other architectures have classes of their own in the library, and no such file.
    """
    for name in names:
        if name.rpartition("/")[2] == INTERFACE:
            _check_one(folder, name, base)


def _check_one(folder: Path, name: str, base: Base) -> None:
    with open_regular(folder, name) as file:
        config = parse_config(file.read(size_limit(name)))
    config.check(INTERFACE_FIELDS)
    interface = config.mapping("interface")
    if base.model_type not in ("qwen2", "qwen3") or config.text("model_type") != base.model_type:
        raise AdapterUnsupported(f"{name}: an interface is not served on {base.model_type}", param=INTERFACE)
    unknown = [field for field in interface if field not in ATTACHED and field not in UNUSED]
    differing = [field for field, module in ATTACHED.items() if interface.get(field) != module]
    for field in (*unknown, *differing):
        raise AdapterUnsupported(f"{name}: {show(field)}={show(interface.get(field))} is not served", param=INTERFACE)


def check_head(folder: Path, names: list[str], base: Base) -> None:
    """Check the heads that the library saves with its adapters, and writes over the model's on loading: one that is
    equal changes nothing.

    Raises:
        AdapterUnsupported: a head differs from the base's.
        BaseWeightsNeeded: the base is known by its shape alone.
    """
    for name in names:
        if name.rpartition("/")[2] not in HEAD_WEIGHTS:
            continue
        inner, _, last = name.rpartition("/")
        tensors = open_tensors(folder / inner, last)
        for tensor in tensors.left:
            head = base.parameters.get(tensor)
            if head is None:
                raise AdapterMismatch(f"{name}: the base has no {show(tensor)}", param=tensor[:200])
            saved = tensors.take(tensor, tuple(head.shape))
            if head.is_meta:
                raise BaseWeightsNeeded(f"{name} can only be compared with a base that is loaded", param=tensor)
            if not torch.equal(saved.to(head.dtype), head.cpu()):
                raise AdapterUnsupported(
                    f"{name} replaces the head of the base by another one, which is not served", param=tensor
                )
