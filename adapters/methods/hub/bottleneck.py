"""Bottleneck adapters as the AdapterHub library has them: Houlsby (arXiv 1902.00751), Pfeiffer (2005.00247), parallel
(2110.04366), Compacter (2106.04647); AdapterDrop (2010.11918) leaves out layers.

h = r + f + s · g · (U act(D x + b) + c), with f the output of attention or of the feed-forward network and r the
residual stream before it; x is r for a parallel adapter, f + r for Pfeiffer's and f for Houlsby's. No norm takes part,
because the library gives its adapters none on a decoder whose norms come first. g is 1, or the mean of σ(w · x + v)
over the tokens of a forward pass (UniPELT, 2110.07577).
"""

from __future__ import annotations

import torch

from weft.adapters.base import SUBLAYERS, Sublayer
from weft.adapters.bottlenecks import Bottleneck
from weft.adapters.config_fields import FieldTable, Neutral, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.hub.compacter import Products
from weft.adapters.methods.hub.saved import Saved
from weft.kernels.grouped_bottleneck import Input

MAX_UNITS = 1 << 20

FIELDS = FieldTable(
    honoured=(
        *(
            "architecture",
            "mh_adapter",
            "output_adapter",
            "reduction_factor",
            "non_linearity",
            "is_parallel",
            "scaling",
            "use_gating",
        ),
        *("original_ln_before", "original_ln_after", "residual_before_ln", "leave_out"),
        *("phm_layer", "phm_dim", "phm_rank", "phm_bias", "factorized_phm_W", "shared_W_phm"),
        *("shared_phm_rule", "factorized_phm_rule"),
    ),
    ignored={
        "adapter_residual_before_ln": "only read with ln_after, which is refused",
        "cross_adapter": "a causal model has no cross-attention",
        "dropout": "no dropout at inference",
        "hypercomplex_nonlinearity": "how the weights were initialised before training",
        "init_weights": "how the weights were initialised before training",
        "init_weights_seed": "how the weights were initialised before training",
        "inv_adapter_reduction_factor": "only read with inv_adapter, which is refused",
        "learn_phm": "whether the rule was trained; it is saved all the same",
        "phm_c_init": "how the rule was initialised before training",
        "phm_init_range": "how the rule was initialised before training",
        "stochastic_depth": "no layer is dropped at inference",
    },
    neutral={
        "inv_adapter": Neutral("an invertible adapter changes the embeddings and the head"),
        "ln_after": Neutral("the adapter ends in a norm of its own"),
        "ln_before": Neutral("the adapter begins with a norm of its own"),
    },
)
"""Every field of BnConfig of adapters 1.3.0."""


def compile_bottlenecks(saved: Saved) -> dict[str, SiteForms]:
    """The bottleneck of every sublayer that has one, by the sublayer's path."""
    config, base = saved.config, saved.base
    config.check(FIELDS)
    if not base.sublayers:
        raise AdapterUnsupported(
            f"bottlenecks are served on {', '.join(SUBLAYERS)}, not on {base.model_type}", param="model_type"
        )
    read = _Reader(saved)
    places = {True: config.flag("mh_adapter"), False: config.flag("output_adapter")}
    left_out = saved.layers_left_out()
    return {
        path: SiteForms(bottleneck=read.bottleneck(sublayer))
        for path, sublayer in base.sublayers.items()
        if places[sublayer.attention] and sublayer.layer not in left_out
    }


class _Reader:
    """What all bottlenecks of one config have in common."""

    def __init__(self, saved: Saved) -> None:
        config = saved.config
        self._saved = saved
        self._activation = saved.activation("relu")
        products = Products.read(saved)
        self._products = products if config.flag("phm_layer") else None
        self._factor = config.value("reduction_factor", None)
        self._scaling = config.value("scaling", 1.0)
        self._gated = config.flag("use_gating")
        self.input = _input(saved)

    def bottleneck(self, sublayer: Sublayer) -> Bottleneck:
        saved, hidden, units = self._saved, self._saved.base.hidden_size, self._units(sublayer.layer)
        layer = sublayer.path.rpartition(".")[0]
        place = "attention_adapters" if sublayer.attention else "output_adapters"
        name = f"{layer}.{place}.adapters.{saved.name}"
        scale = self._scale(name)
        if self._products is not None:
            down, down_bias = self._products.weight(f"{name}.adapter_down.0", "down", hidden, units)
            up, up_bias = self._products.weight(f"{name}.adapter_up", "up", units, hidden)
        else:
            down = saved.take(f"{name}.adapter_down.0.weight", units, hidden)
            down_bias = saved.take(f"{name}.adapter_down.0.bias", units)
            up = saved.take(f"{name}.adapter_up.weight", hidden, units)
            up_bias = saved.take(f"{name}.adapter_up.bias", hidden)
        gate = saved.gate(f"{name}.gate", 1, hidden) if self._gated else None
        return Bottleneck(down, down_bias, scale.view(-1, 1) * up, scale * up_bias, self._activation, self.input, gate)

    def _units(self, layer: int) -> int:
        """The width of the bottleneck: the hidden size divided by a number, of all layers or of this one."""
        factor = self._factor
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
        number = as_number("reduction_factor", factor)
        hidden = self._saved.base.hidden_size
        if number <= 0 or hidden / number > MAX_UNITS:
            raise AdapterFormatError(f"reduction_factor={show(factor)} gives no bottleneck", param="reduction_factor")
        return max(1, int(hidden // number))

    def _scale(self, name: str) -> torch.Tensor:
        """s, one number or one for each element."""
        if self._scaling == "learned":
            return self._saved.take(f"{name}.scaling", 1)
        if self._scaling == "channel":
            return self._saved.take(f"{name}.scaling", self._saved.base.hidden_size)
        return torch.tensor([as_number("scaling", self._scaling)])


def _input(saved: Saved) -> Input:
    config = saved.config
    parallel, with_residual = config.flag("is_parallel"), config.flag("original_ln_before")
    residual = config.value("residual_before_ln", True)
    if not config.flag("original_ln_after", True):
        raise AdapterUnsupported(
            "original_ln_after=False is not served: the residual stream ends at the adapter", param="original_ln_after"
        )
    if residual is not True and not parallel:
        raise AdapterUnsupported(
            f"residual_before_ln={show(residual)} is not served: the residual stream is added twice",
            param="residual_before_ln",
        )
    if parallel:
        return Input.RESIDUAL
    return Input.SUM if with_residual else Input.OUTPUT
