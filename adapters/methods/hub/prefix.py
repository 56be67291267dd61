"""Prefix tuning (arXiv 2101.00190) as the AdapterHub library has it: real tokens start at position 0, and the network
that makes keys and values is saved, where peft saves what it makes. A gated prefix (UniPELT, 2110.07577) has in every
layer gates that its keys and values are multiplied by: the means of σ(w · x + v) over the tokens of a forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.nn.functional import linear

from weft.adapters.config_fields import FieldTable, Neutral, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import PrefixKV, SiteForms
from weft.adapters.methods.hub.saved import Saved
from weft.adapters.parts import Gate, JointPrefix
from weft.kernels.activations import activate

MAX_LENGTH = 1 << 12
MAX_BOTTLENECK = 1 << 16

FIELDS = FieldTable(
    honoured=(
        "architecture",
        "flat",
        "prefix_length",
        "bottleneck_size",
        "non_linearity",
        "use_gating",
        "shared_gating",
    ),
    ignored={
        "cross_prefix": "a causal model has no cross-attention",
        "dropout": "no dropout at inference",
        "encoder_prefix": "a causal model has no encoder",
        "init_weights_seed": "how the weights were initialised before training",
    },
    neutral={
        "leave_out": Neutral("layers without a prefix would attend to pages that hold none"),
    },
)
"""Every field of PrefixTuningConfig of adapters 1.3.0."""

SERVED: Mapping[str, tuple[str, str]] = MappingProxyType({"llama": ("q_proj", "o_proj"), "gpt2": ("c_attn", "c_proj")})
"""By model type the linears that make the queries of an attention and project what they find."""


def compile_prefix(saved: Saved) -> PrefixKV | dict[str, SiteForms]:
    """Keys and values, as they stand in front of those of the tokens: keys are not rotated any more. Gated ones are
    the tokens' own, and so forms of every layer."""
    config, base = saved.config, saved.base
    config.check(FIELDS)
    if base.model_type not in SERVED:
        raise AdapterUnsupported(
            f"AdapterHub's prefix is served on {', '.join(SERVED)}, not on {base.model_type}, which may attend in a "
            "sliding window, where the library shows it to all tokens, or has none in the library",
            param="architecture",
        )
    n = config.integer("prefix_length", 30, low=1, high=MAX_LENGTH)
    inner = config.integer("bottleneck_size", 512, low=1, high=MAX_BOTTLENECK)
    activation = saved.activation("tanh")
    width = 2 * base.num_layers * base.kv_heads * base.head_dim
    if config.flag("flat"):
        rows = _shared(saved, "control_trans", n * width).view(n, width)
    else:
        vectors = _shared(saved, "wte.weight", n, base.hidden_size)
        first = (_shared(saved, "control_trans.0.weight", inner, base.hidden_size), "control_trans.0.bias")
        last = (_shared(saved, "control_trans.2.weight", width, inner), "control_trans.2.bias")
        z = activate(linear(vectors, first[0], _shared(saved, first[1], inner)), activation)
        rows = linear(z, last[0], _shared(saved, last[1], width))
    gated, shared = config.flag("use_gating"), config.flag("shared_gating", True)
    tensors = rows.view(n, 2 * base.num_layers, base.kv_heads, base.head_dim).unbind(1)
    prefix = PrefixKV(tensors[0::2], tensors[1::2], position_offset=0)
    return _joint(saved, prefix, shared) if gated else prefix


def _joint(saved: Saved, prefix: PrefixKV, shared: bool) -> dict[str, SiteForms]:
    """A gated prefix, with one gate for keys and values, or one for each."""
    base, forms = saved.base, {}
    queries, projection = SERVED[base.model_type]
    for sublayer in base.sublayers.values():
        if not sublayer.attention:
            continue
        name = f"{sublayer.path}.prefix_tuning.prefix_gates.{saved.name}"
        gate = saved.gate(name, 1 if shared else 2, base.hidden_size)
        both = Gate(gate.weight.expand(2, -1), gate.bias.expand(2), gate.link)
        keys, values = (tensors[sublayer.layer].flatten(1) for tensors in (prefix.keys, prefix.values))
        forms[f"{sublayer.path}.{queries}"] = SiteForms(prefix_gate=both.rows())
        forms[f"{sublayer.path}.{projection}"] = SiteForms(joint=JointPrefix(keys, values))
    return forms


def _shared(saved: Saved, part: str, *shape: int) -> torch.Tensor:
    """A tensor of the one prefix that all layers share; the library saves it once more for every layer.

    Raises:
        AdapterMismatch: it is missing, or the copies differ.
    """
    tensors = saved.checkpoint.tensors
    ending = f"prefix_tunings.{saved.name}.self_prefix.{part}"
    names = [name for name in tensors.left if name.endswith(f".{ending}") or name == ending]
    if not names:
        raise AdapterMismatch(f"the tensor {show(ending)} is missing", param=ending[:200])
    first, *copies = [tensors.take(name, shape) for name in names]
    if not all(torch.equal(first, copy) for copy in copies):
        raise AdapterMismatch(f"{show(ending)} differs between layers, which share it", param=ending[:200])
    return first.float()
