"""LoRA, IA3 and DoRA as the AdapterHub library has them, which is not quite as peft has: IA3 scales outputs alone, and
DoRA's norm is that of W + B A without LoRA's scale, and rescales the base's bias too. A gated LoRA (UniPELT, arXiv
2110.07577) has a gate in place of LoRA's scale, the mean of σ(w · x + v) over the tokens of a forward pass; on a merged
linear one for each of q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from weft.adapters.base import Site
from weft.adapters.config_fields import FieldTable, Neutral, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.hub.saved import Saved
from weft.adapters.parts import GatedLowRank, LowRank

MAX_RANK = 1 << 14
MATRICES = ("q", "k", "v")

FIELDS = FieldTable(
    honoured=(
        *("architecture", "selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "leave_out"),
        *("r", "alpha", "composition_mode", "use_dora", "use_gating"),
    ),
    ignored={
        "dropout": "no dropout at inference",
        "dtype": "the tensors have one",
        "init_weights": "how the weights were initialised before training",
        "init_weights_seed": "how the weights were initialised before training",
    },
    neutral={
        "vera_b": Neutral("VeRA's shared matrices are saved in a layer of their own"),
        "vera_d": Neutral("VeRA's shared matrices are saved in a layer of their own"),
    },
)
"""Every field of LoRAConfig of adapters 1.3.0."""

_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_LLAMA = MappingProxyType({**_ATTENTION, "intermediate": "mlp.down_proj", "output": "mlp.up_proj"})
_QWEN = MappingProxyType({**_ATTENTION, "intermediate": "mlp.up_proj", "output": "mlp.down_proj"})
PLACES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _QWEN,
        "qwen3": _QWEN,
        "gpt2": MappingProxyType({"qkv": "attn.c_attn", "intermediate": "mlp.c_fc", "output": "mlp.c_proj"}),
    }
)
"""Where the library puts LoRA, by model type and by its own names. On Llama, intermediate is indeed the last linear."""


def compile_lora(saved: Saved) -> dict[str, SiteForms]:
    """The forms of every linear that the config adapts."""
    config, base = saved.config, saved.base
    config.check(FIELDS)
    if base.model_type not in PLACES:
        raise AdapterUnsupported(
            f"AdapterHub's LoRA is served on {', '.join(PLACES)}, not on {base.model_type}", param="model_type"
        )
    read = _Reader(saved)
    left_out = saved.layers_left_out()
    layers = {s.path.rpartition(".")[0]: s.layer for s in base.sublayers.values() if s.layer not in left_out}
    return {
        f"{layer}.{path}": read.site(base.sites[f"{layer}.{path}"], merged=place == "qkv")
        for layer in layers
        for place, path in PLACES[base.model_type].items()
        if place in read.places
    }


class _Reader:
    """What all sites of one config have in common."""

    def __init__(self, saved: Saved) -> None:
        config = saved.config
        self._saved = saved
        names = config.value("attn_matrices", ["q", "v"])
        if not isinstance(names, list) or not names or not all(name in MATRICES for name in names):
            raise AdapterFormatError(
                f"attn_matrices must name some of q, k, v, got {show(names)}", param="attn_matrices"
            )
        self._chosen = [name in names for name in MATRICES]
        attention = {"qkv", *names} if config.flag("selfattn_lora", True) else set()
        others = {place for place in ("intermediate", "output") if config.flag(f"{place}_lora")}
        self.places = attention | others
        self._rank = config.integer("r", 8, low=1, high=MAX_RANK)
        self._alpha = config.number("alpha", 8)
        if saved.version is not None and (0, 0) < saved.version < (1, 1):
            self._alpha = self._rank  # what these versions computed, and the library restores
        self._dora = config.flag("use_dora")
        self._gated = config.flag("use_gating")
        self._ia3 = _is_ia3(config.text("composition_mode"))
        if self._ia3 and (self._rank != 1 or self._dora):
            raise AdapterFormatError("composition_mode='scale' goes with r=1 and without use_dora", param="r")
        if self._gated and (self._ia3 or self._dora):
            raise AdapterUnsupported(
                "use_gating is served where what is gated is added: not with use_dora, nor composition_mode='scale'",
                param="use_gating",
            )

    def site(self, site: Site, *, merged: bool) -> SiteForms:
        """The forms of one linear; ``merged``: its outputs are those of q, k and v."""
        name = f"{site.path}.loras.{self._saved.name}"
        if self._ia3:
            return SiteForms(gain_out=self._gain(name, site, merged))
        if merged:
            form = self._merged(name, site)
        else:
            a = self._saved.take(f"{name}.lora_A", self._rank, site.in_features)
            form = LowRank(a, self._saved.take(f"{name}.lora_B", site.out_features, self._rank))
        if self._gated:  # in place of the scale
            gate = self._saved.gate(f"{name}.gate", sum(self._chosen) if merged else 1, site.in_features)
            return SiteForms(gated=GatedLowRank(form.a, form.b, gate))
        scale = self._alpha / self._rank
        if not self._dora:
            return SiteForms(LowRank(form.a, scale * form.b, scale=None if merged else scale))
        if site.kind != "linear":
            raise AdapterUnsupported(
                "use_dora is not served on Conv1D, where the library itself fails", param="use_dora"
            )
        magnitude = self._saved.take(f"{name}.m.weight", site.out_features, 1)[:, 0]
        gain = magnitude / (self._saved.base.weight(site) + form.b @ form.a).norm(dim=1)
        return SiteForms(LowRank(form.a, (scale * gain)[:, None] * form.b), gain_out=gain)

    def _merged(self, name: str, site: Site) -> LowRank:
        """Every chosen third of the outputs has a part of A and a part of B of its own: B is block-diagonal."""
        rank, width, count = self._rank, _third(site), sum(self._chosen)
        a = self._saved.take(f"{name}.lora_A", rank * count, site.in_features)
        blocks = iter(self._saved.take(f"{name}.lora_B", width * count, rank).split(width))
        b = torch.zeros(site.out_features, rank * count)
        for at, third in enumerate(third for third, chosen in enumerate(self._chosen) if chosen):
            b[third * width : (third + 1) * width, at * rank : (at + 1) * rank] = next(blocks)
        return LowRank(a, b)

    def _gain(self, name: str, site: Site, merged: bool) -> torch.Tensor:
        """IA3's vector times alpha; where a third of a merged linear is not chosen, alpha alone."""
        if not merged:
            return self._alpha * self._saved.take(f"{name}.lora_B", site.out_features, 1)[:, 0]
        width = _third(site)
        gain = torch.ones(3, width)
        vectors = self._saved.take(f"{name}.lora_B", width * sum(self._chosen), 1)
        gain[torch.tensor(self._chosen)] = vectors.view(-1, width)
        return self._alpha * gain.flatten()


def _third(site: Site) -> int:
    if site.out_features % 3:
        raise AdapterMismatch(f"{site.path} does not hold q, k and v of one width", param="attn_matrices")
    return site.out_features // 3


def _is_ia3(mode: str | None) -> bool:
    if mode not in (None, "add", "scale"):
        raise AdapterFormatError(f"composition_mode must be add or scale, got {show(mode)}", param="composition_mode")
    return mode == "scale"
