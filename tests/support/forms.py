"""Compiled forms applied by hand, one adapter to a plain transformers model: what the engine must agree with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

from weft.adapters.backbone import Backbone
from weft.adapters.bottlenecks import Bottleneck
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.parts import GatedLowRank, GatedPrefix, RoutedLowRank
from weft.adapters.side import SideNetwork
from weft.kernels.activations import activate
from weft.kernels.mean_gates import Link


def dense_delta(forms: SiteForms) -> torch.Tensor:
    """``B A`` in fp64, ``[out, in]``, of experts ``[experts, out, in]``: what the adapter adds to a linear's weight."""
    assert forms.low_rank is not None
    a, b, experts = forms.low_rank.a.double(), forms.low_rank.b.double(), forms.low_rank.experts
    if experts == 1:
        return b @ a
    return b.view(len(b), experts, -1).transpose(0, 1) @ a.view(experts, -1, a.shape[1])


@contextmanager
def applied(model: nn.Module, adapter: CompiledAdapter) -> Iterator[None]:
    """Add each site's forms to the output of its module, or where they are of a parameter to that, in fp32."""
    queries: list[torch.Tensor] = []
    source = sys.modules[type(model).__module__]
    eager = source.eager_attention_forward

    def watched(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries[:] = [query]
        return eager(module, query, *args, **kwargs)

    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    handles, originals, states = [], {}, list[torch.Tensor]()
    for path, forms in adapter.sites.items():
        module = modules.get(path)
        if module is not None and (forms.network is not None or forms.side is not None):
            handles += _beside(forms, model, module, states)
            continue
        if module is not None and not path.endswith((".gate", ".router")):
            handles.append(module.register_forward_hook(_hook(forms, queries)))
            continue
        weight, bias = parameters[path if module is None else f"{path}.weight"], parameters.get(f"{path}.bias")
        update = dense_delta(forms) if forms.low_rank else forms.delta
        originals |= {p: p.detach().clone() for p in (weight, bias) if p is not None}
        if update is not None:
            # GPT-OSS alone has biases beside its experts, and stores their weights as [experts, in, out].
            weight.data += update.float().mT if f"{path}_bias" in parameters else update.float()
        if bias is not None and forms.shift is not None:
            bias.data += forms.shift
    try:
        with mock.patch.object(source, "eager_attention_forward", watched):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, original in originals.items():
            parameter.data.copy_(original)


def _beside(forms: SiteForms, model: Any, module: nn.Module, states: list[torch.Tensor]) -> list[Any]:
    """Hooks of a side network: on the stack of layers, whose first argument is the tokens, and on its layers."""
    network, side = forms.network, forms.side

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert network is not None
        states[:] = [_side_state(network, model, args[0] if args else kwargs["input_ids"])]

    def before(module: nn.Module, args: Any) -> Any:
        assert side is not None
        h = args[0]
        return (h + (h - states[0]) @ side.injection.a.T @ side.injection.b.T, *args[1:])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        assert side is not None
        h = output if isinstance(output, torch.Tensor) else output[0]
        gate = _passed(side.gate, h).sigmoid()
        states[:] = [(1 - gate) * states[0] + gate * _passed(side.transform, h)]

    if network is not None:
        return [module.register_forward_pre_hook(begin, with_kwargs=True)]
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _passed(bottleneck: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    z = activate(x @ bottleneck.down.T + bottleneck.down_bias, bottleneck.activation)
    return z @ bottleneck.up.T + bottleneck.up_bias


def _side_state(network: SideNetwork, model: Any, ids: torch.Tensor) -> torch.Tensor:
    backbone = Backbone.of(model)
    assert backbone is not None
    weights = dict(zip(network.names, network.weights, strict=True))
    projection = weights.pop("", None)
    given = {"input_ids": ids} if network.sizes.embeds else {"inputs_embeds": model.get_input_embeddings()(ids)}
    module = backbone.smaller(network.sizes, torch.float32).module
    state: torch.Tensor = functional_call(module, weights, (), {**given, "use_cache": False}).last_hidden_state
    return state if projection is None else state @ projection.T


def _found(prefix: GatedPrefix, query: torch.Tensor) -> torch.Tensor:
    """What queries ``[1, heads, T, d]`` find in a prefix, ``[1, T, heads * d]``, one head after the other."""
    heads, width = query.shape[1], query.shape[3]
    group = heads // (prefix.keys.shape[1] // width)
    found = []
    for head in range(heads):
        at = slice(head // group * width, (head // group + 1) * width)
        found.append((query[0, head] @ prefix.keys[:, at].T).softmax(-1) @ prefix.values[:, at])
    return torch.cat(found, -1).unsqueeze(0)


def _routed(routed: RoutedLowRank, x: torch.Tensor) -> torch.Tensor:
    """The weighted updates of all experts, each of them in full."""
    likeness = (x @ routed.prototypes.T).abs()
    least = likeness.topk(routed.top_k, dim=-1).values[..., -1:]
    weights = likeness.masked_fill(likeness < least, float("-inf")).softmax(-1)
    experts = len(routed.prototypes)
    pairs = zip(routed.a.chunk(experts), routed.b.chunk(experts, dim=1), strict=True)
    updates = torch.stack([x @ a.T @ b.T for a, b in pairs], dim=-1)
    return (updates * weights.unsqueeze(-2)).sum(-1)


def _gated(gated: GatedLowRank, x: torch.Tensor) -> torch.Tensor:
    """The updates of all gates, each of them in full, for ``x`` of one prompt."""
    scores = x @ gated.gate.weight.T + gated.gate.bias
    values = scores.softmax(-1) if gated.gate.link is Link.SOFTMAX else scores.sigmoid()
    ups = gated.b.chunk(values.shape[-1], dim=1)
    downs = gated.a.split(ups[0].shape[1])
    pairs = [(downs[at % len(downs)], up) for at, up in enumerate(ups)]
    return sum(gate * (x @ a.T @ b.T) for gate, (a, b) in zip(values.mean(-2)[0], pairs, strict=True))


def _hook(forms: SiteForms, queries: list[torch.Tensor]) -> Any:
    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if isinstance(module, nn.Embedding):
            return _embedded(forms, x, output)
        own = {name: getattr(forms, name) for name in ("weight", "bias") if getattr(forms, name) is not None}
        if own:
            twin = deepcopy(module)
            twin._forward_hooks.clear()  # this very hook is among them
            output = functional_call(twin, own, (x,))
        if forms.gain_in is not None or forms.rotate_in is not None:
            scaled = x if forms.gain_in is None else x * forms.gain_in
            output = type(module).forward(module, _rotated(scaled, forms.rotate_in))
        if forms.prefix is not None:
            found = _found(forms.prefix, queries[0])
            output = type(module).forward(module, x + found) if forms.prefix.projected else output + found
        if forms.turn is not None:
            halves = output.unflatten(-1, (-1, 2, forms.turn.distance))
            own, other = forms.turn.rows
            output = (1 + own) * output + other * halves.flip(-2).flatten(-3)
        if forms.gain_out is not None:
            output = output * forms.gain_out
        if forms.shift is not None:
            output = output + forms.shift
        if forms.low_rank is not None:
            output = output + x @ forms.low_rank.a.T @ forms.low_rank.b.T
        if forms.routed is not None:
            output = output + _routed(forms.routed, x)
        if forms.gated is not None:
            output = output + _gated(forms.gated, x)
        if forms.delta is not None:
            output = output + x @ forms.delta.T
        if forms.sparse is not None:
            sparse, outputs = forms.sparse, torch.arange(output.shape[-1])
            update = torch.zeros(output.shape[-1], x.shape[-1])
            places = outputs.repeat_interleave(sparse.starts.diff()), sparse.columns.long()
            output = output + x @ update.index_put_(places, sparse.values, accumulate=True).T
        if forms.rows is not None:
            output[..., forms.rows.ids] = x @ forms.rows.vectors.T
        return output

    return add


def _rotated(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    return x if rotation is None else x + x @ torch.block_diag(*rotation.split(rotation.shape[0], dim=1))


def _embedded(forms: SiteForms, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    output = _rotated(output, forms.rotate_in)
    if forms.gain_out is not None:
        output = output * forms.gain_out
    if forms.low_rank is not None:
        output = output + forms.low_rank.a.T[ids] @ forms.low_rank.b.T
    if forms.rows is not None:
        for token, vector in zip(forms.rows.ids, forms.rows.vectors, strict=True):
            output = torch.where((ids == token).unsqueeze(-1), vector, output)
    return output
