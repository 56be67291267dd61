"""weft's attention as transformers calls it: keys and values go to their pages, queries attend to the pages.

Registered with transformers' ``AttentionInterface``, so that an architecture works because transformers has it. The
function honours every argument that changes the result; a model that passes another one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface

from weft.adapters.site import ActiveRows
from weft.kernels.gated_prefix import Joint
from weft.kernels.paged_attention import AttentionRows, LogSumExp, paged_attention, write_kv
from weft.kernels.paged_attention.backends import Attend, Layer

T = TypeVar("T")

NAME = "weft_paged"
PROBE = "weft_probe"

# What models pass that does not change the result of an eval forward over a flat batch with explicit positions.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
)


class UnsupportedModel(Exception):
    """The base model cannot be served exactly; the message says why."""


@dataclass
class AttentionContext:
    """What a forward pass hands to every layer's attention, as the model's keyword argument ``weft``.

    Attributes:
        rows: where the rows' tokens, keys and values lie.
        k_caches, v_caches: per layer, ``[pages, page_size, kv_heads, head_dim]``.
        sites: what the adapters' sites look at; they are shown the queries.
        attend: computes paged attention.
    """

    rows: AttentionRows
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    sites: ActiveRows
    attend: Attend = paged_attention


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    weft: AttentionContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention over a flat batch: query ``[1, heads, T, d]``, key and value ``[1, kv_heads, T, d]``.

    Returns:
        ``[1, T, heads, d_v]`` and no weights, as transformers expects.

    Raises:
        UnsupportedModel: the model asks for something this attention does not do.
    """
    _check(module, attention_mask, dropout, is_causal, others)
    layer, context = _layer(module, weft)
    k_cache, v_cache = context.k_caches[layer], context.v_caches[layer]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    context.sites.query = q
    write_kv(k_cache, v_cache, k, v, context.rows.slot_mapping)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = context.attend(
        q,
        k_cache,
        v_cache,
        context.rows,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        lse=_joined(context.sites, q, scale),
    )
    return out.unsqueeze(0), None


def _joined(sites: ActiveRows, query: torch.Tensor, scale: float) -> LogSumExp | None:
    """What is wanted besides the output, where adapters' own prefixes join the softmax at the output projection."""
    gates, spans = sites.prefix_gates, sites.spans
    if gates is None or spans is None:
        return None
    lse = LogSumExp(query.new_empty(query.shape[:2], dtype=torch.float32), spans.rows)
    sites.joint, sites.prefix_gates = Joint(lse.values, gates, scale), None
    return lse


def probe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    weft: dict[int, Layer] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in for ``attend`` to write down what each layer asks for."""
    layer, layers = _layer(module, weft)
    sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    layers[layer] = Layer(*sizes, sliding_window, softcap, s_aux is not None)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _layer(module: nn.Module, context: T | None) -> tuple[int, T]:
    """The layer's number, and the context if the model handed it through."""
    layer = getattr(module, "layer_idx", None)
    if context is None or not isinstance(layer, int):
        what = "its keyword arguments" if context is None else "a layer number"
        raise UnsupportedModel(f"{type(module).__name__} does not hand {what} to attention")
    return layer, context


def _check(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    # None and False say that an option is off.
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = given - _WITHOUT_EFFECT
    name = type(module).__name__
    if unknown:
        raise UnsupportedModel(f"{name} passes {', '.join(sorted(unknown))} to attention, which weft does not honour")
    if attention_mask is not None:
        raise UnsupportedModel(f"{name} passes an attention mask of its own, which weft does not honour")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel(f"{name} attends in both directions; weft serves causal models")
    if dropout:
        raise UnsupportedModel(f"{name} passes dropout {dropout} in an eval forward")


def register() -> None:
    """Make the attention known to transformers under ``NAME`` and ``PROBE``. May be called again.

    Causality, windows and row borders follow from the rows, so no mask is built: transformers makes none for an
    attention without a mask function of its own. With one that returns None, it would first look for packed sequences
    in the positions, and wait for the device.
    """
    for name, function in ((NAME, attend), (PROBE, probe)):
        AttentionInterface.register(name, function)
