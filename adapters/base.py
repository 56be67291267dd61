"""What an adapter must know of its base: the modules it can attach to, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.adapters.backbone import Backbone
from weft.adapters.errors import BaseWeightsNeeded
from weft.adapters.mixtures import expert_weights, is_experts, is_router
from weft.adapters.quantized import Int8Linear, dequantized, is_quantized


@dataclass(frozen=True)
class Site:
    """One module of the base that adapters can attach to.

    Attributes:
        path: its name in ``model.named_modules()``, e.g. ``model.layers.0.self_attn.q_proj``.
        kind: ``"linear"`` (weight ``[out, in]``), ``"conv1d"`` (GPT-2's, weight ``[in, out]``), ``"norm"``,
            ``"embedding"`` (weight ``[in, out]``), ``"router"`` (a module of its own with a linear's weight) or
            ``"experts"`` (a parameter that holds a linear for each expert; the path is the parameter's).
        in_features, out_features: widths of input and output, whatever the storage order; an embedding's input is as
            wide as its vocabulary.
        has_bias: whether the base adds a bias here.
        experts: how many linears the parameter holds; 0 unless the kind is ``"experts"``.
        transposed: of experts: stored as ``[experts, in, out]``, else ``[experts, out, in]``.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    has_bias: bool
    experts: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Sublayer:
    """A half of a layer: its norm is given the residual stream, to which its output is added.

    Attributes:
        path: of the module between the two, e.g. ``model.layers.0.mlp``.
        norm: path of the norm.
        layer: number of the layer.
        attention: it is the attention; else the feed-forward network.
    """

    path: str
    norm: str
    layer: int
    attention: bool


FREQUENCIES = "rotary_emb.inv_freq"
"""How the name of that buffer ends; transformers before 4.32 saved it in every layer."""

_LLAMA = MappingProxyType({"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"})
SUBLAYERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gpt2": MappingProxyType({"attn": "ln_1", "mlp": "ln_2"}),
    }
)
"""Attention and feed-forward network, each with its norm, by model type: where both are added to the residual stream as
they are, one after the other."""


@dataclass(frozen=True)
class Base:
    """The base model as seen by a loader.

    Attributes:
        model_type: transformers' name of the architecture (``config.model_type``).
        num_layers: ``config.num_hidden_layers``.
        sites: linear modules by path, in the order of ``named_modules()``.
        norms: likewise, modules that have a weight, and perhaps a bias, for each element of what they normalise.
        sublayers: by path, in the order they run; empty for architectures that are not known to have such.
        parameter_sites: likewise, routers and experts: linears that are no modules of their own, reached by the name of
            their parameters alone.
        module_paths: every module's path, to tell "not a linear" from "not there".
        dtype: of the base's weights.
        hidden_size: width of the embeddings.
        kv_heads, head_dim: of the keys and values, by the configuration.
        embedding: the module that makes vectors of token ids.
        embedding_scale: what that module multiplies its weight with (Gemma 3).
        head: path of the module that makes the logits (``lm_head``), if the model names one.
        tied: the head's weight is the embedding's.
        config: transformers' configuration of it.
        frequencies: of its rotary embedding, where it has one.
        adapter_memory: bytes one adapter can have at most where it is to be served; None where that is not known.
        parameters: the base's own parameters by name, tied ones under each of their names; references, no copies.
            The weights of quantised linears are not among them.
        quantized: linears whose weight is kept in fewer bits, by path.
        backbone: the stack of its layers, where that can be found.
    """

    model_type: str
    num_layers: int
    sites: Mapping[str, Site]
    module_paths: tuple[str, ...]
    dtype: torch.dtype
    norms: Mapping[str, Site] = field(default_factory=dict)
    sublayers: Mapping[str, Sublayer] = field(default_factory=dict)
    parameter_sites: Mapping[str, Site] = field(default_factory=dict)
    hidden_size: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    embedding: Site | None = None
    embedding_scale: float = 1.0
    head: str | None = None
    tied: bool = False
    config: PreTrainedConfig | None = field(default=None, repr=False)
    frequencies: torch.Tensor | None = field(default=None, repr=False)
    adapter_memory: int | None = None
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    quantized: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    backbone: Backbone | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Base:
        """Describe ``model`` (a transformers causal LM, on any device, ``meta`` included)."""
        sites, norms = {}, {}
        parameter_sites: dict[str, Site] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Int8Linear):
                sites[path] = Site(path, "linear", module.in_features, module.out_features, module.bias is not None)
            elif isinstance(module, Conv1D):
                sites[path] = Site(path, "conv1d", module.nx, module.nf, True)
            elif (width := _norm_width(module)) is not None:
                norms[path] = Site(path, "norm", width, width, getattr(module, "bias", None) is not None)
            elif is_router(module):
                outputs, inputs = module.get_parameter("weight").shape
                has_bias = getattr(module, "bias", None) is not None
                parameter_sites[path] = Site(path, "router", inputs, outputs, has_bias)
            elif is_experts(module):
                parameter_sites |= {site.path: site for site in _experts(path, module)}
        config = model.config
        output = model.get_output_embeddings()
        head = next((path for path, module in model.named_modules() if module is output), None)
        vectors = model.get_input_embeddings()
        source = next(path for path, module in model.named_modules() if module is vectors)
        vocab_size, width = vectors.get_parameter("weight").shape
        quantized = {path: module for path, module in model.named_modules() if is_quantized(module)}
        packed = {f"{path}.weight" for path in quantized}
        parameters = model.named_parameters(remove_duplicate=False)
        return cls(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            sites=sites,
            module_paths=tuple(path for path, _ in model.named_modules()),
            dtype=model.dtype,
            norms=norms,
            sublayers=_sublayers(model),
            parameter_sites=parameter_sites,
            hidden_size=config.hidden_size,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            embedding=Site(source, "embedding", vocab_size, width, False),
            embedding_scale=float(getattr(vectors, "scalar_embed_scale", 1.0)),
            head=head,
            config=config,
            frequencies=next((b for n, b in model.named_buffers() if n.endswith(f".{FREQUENCIES}")), None),
            tied=output is not None and output.weight is vectors.weight,
            parameters={name: p.detach() for name, p in parameters if name not in packed},
            quantized=quantized,
            backbone=Backbone.of(model),
        )

    def module(self, path: str) -> Site | None:
        """The module at ``path``, if adapters can attach to it."""
        if self.embedding is not None and path == self.embedding.path:
            return self.embedding
        return self.sites.get(path) or self.norms.get(path) or self.parameter_sites.get(path)

    def is_layer(self, path: str) -> bool:
        """Whether the residual stream runs through ``path``: a sublayer, a layer or the stack of them all."""
        backbone = self.backbone
        return path in self.sublayers or (backbone is not None and (path == backbone.path or path in backbone.layers))

    def weight(self, site: Site) -> torch.Tensor:
        """The frozen weight of a site, fp32 on the CPU: ``[out, in]`` of a linear layer whatever its storage order.

        A quantised linear's is the one it multiplies with.

        Raises:
            BaseWeightsNeeded: the base is known by its shape alone.
        """
        packed = self.quantized.get(site.path)
        if packed is not None:
            if packed.get_parameter("weight").is_meta:
                raise _needed(f"{site.path}.weight")
            return dequantized(packed).float().cpu()
        weight = self._loaded(f"{site.path}.weight").float()
        return weight.T if site.kind == "conv1d" else weight

    def bias(self, site: Site) -> torch.Tensor | None:
        """The frozen bias of a site, ``[out]`` in fp32 on the CPU; None where it has none.

        Raises:
            BaseWeightsNeeded: the base is known by its shape alone.
        """
        return self._loaded(f"{site.path}.bias").float() if site.has_bias else None

    def _loaded(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        if parameter.is_meta:
            raise _needed(name)
        return parameter.cpu()


def _needed(name: str) -> BaseWeightsNeeded:
    return BaseWeightsNeeded(f"the adapter can only be read beside the base's weights ({name})")


def _sublayers(model: PreTrainedModel) -> dict[str, Sublayer]:
    """The halves of every layer; layers are named by their number (``model.layers.0``, ``transformer.h.0``)."""
    found = {}
    for path, _ in model.named_modules():
        layer, _, name = path.rpartition(".")
        norms = SUBLAYERS.get(model.config.model_type, {})
        number = layer.rpartition(".")[2]
        if name in norms and number.isdecimal():
            found[path] = Sublayer(path, f"{layer}.{norms[name]}", int(number), name != "mlp")
    return found


def _experts(path: str, module: Any) -> Iterator[Site]:
    """The parameters of an experts module that are linears, in the order of the computation."""
    for name in expert_weights(module):
        experts, rows, columns = module.get_parameter(name).shape
        widths = (rows, columns) if module.is_transposed else (columns, rows)
        yield Site(
            f"{path}.{name}", "experts", *widths, module.has_bias, experts=experts, transposed=module.is_transposed
        )


def _norm_width(module: nn.Module) -> int | None:
    """The width of a module that is called a norm and has a weight, and perhaps a bias, of that length; else None."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    one_vector = "weight" in shapes and shapes.keys() <= {"weight", "bias"} and len(set(shapes.values())) == 1
    if not one_vector or len(shapes["weight"]) != 1 or "norm" not in type(module).__name__.lower():
        return None
    return shapes["weight"][0]
