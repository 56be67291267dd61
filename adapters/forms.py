"""The runtime forms adapters compile to. No method's name is known past its loader.

At a linear site with weight W and bias b0, a row x of the batch becomes

    y = gain_out * T(W ((gain_in * x) R) + b0) + shift + B (A x) + D x + S x

where R, block-diagonal, rotates the input, T turns pairs of outputs, S is sparse, everything but W and b0 is the
adapter's own, and what it has not is left out. In place of B (A x) there may be several such products, weighed by what
x is, or by gates: each the mean of something over the tokens of a prompt, and for a later token its own. Behind
attention, what the layer's queries find in a gated prefix is added to x or to y, or joins what they found. At a norm
the adapter's own weight and bias stand in for the base's. At the token embedding R rotates the vectors that the base
has for the tokens. A sublayer (attention, feed-forward network) whose output f is added to the residual stream r gives

    f + U act(D x + b) + c                          x = f, r or f + r: a bottleneck
    f + Σ a_n V u_n,  a = softmax_n((Q x + q) · (K u_n + k))       u_n = U_n act_n(D_n x + b_n) + c_n: a fusion

in its place. A side network makes a state beside the base, which goes into its layers and is changed by them; see
``weft.adapters.side``. The base is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from weft.adapters.bottlenecks import Bottleneck, Fusion
from weft.adapters.choices import Choice
from weft.adapters.parts import (
    GatedLowRank,
    GatedPrefix,
    JointPrefix,
    LowRank,
    Part,
    RoutedLowRank,
    Sparse,
    TokenRows,
    Turn,
)
from weft.adapters.side import SideLayer, SideNetwork
from weft.kernels.mean_gates import Link


@dataclass(frozen=True)
class SiteForms:
    """What one adapter does at one site of the base; see the formulas above.

    Attributes:
        low_rank: the low-rank update, if any.
        gain_in: ``[in]``, scales the input of W alone.
        gain_out: ``[out]``, scales what the base computes, its bias included and turned.
        shift: ``[out]``, added to that.
        delta: ``[out, in]``, an update of W without a cheaper structure.
        rows: of an embedding or the head.
        weight, bias: ``[out]``, of a norm, in place of the base's.
        prefix: of the output projection of an attention layer.
        routed: low-rank updates weighed by each row's input.
        rotate_in: ``[size, in]``, R − 1 in blocks of ``size``, which divides the input's width: row i has at column n
            the element ``(i, n % size)`` of n's block. R rotates the input of W alone, once it is scaled; at the
            embedding it is as wide as the vectors. Less 1, because 16 bits hold a small rotation better that way.
        turn: of what the base computes, its bias included.
        sparse: an update of W of few values.
        gated: low-rank updates weighed by gates.
        joint: of the output projection of an attention layer.
        prefix_gate: ``[3, in]``, of the linear that makes the queries: rows of the gates of ``joint``, two sigmoids.
        bottleneck, fusion: of a sublayer; not both.
        side: of a layer, beside a side network.
        network: of the stack of layers, the side network.
    """

    low_rank: LowRank | None = None
    gain_in: torch.Tensor | None = None
    gain_out: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    rows: TokenRows | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    prefix: GatedPrefix | None = None
    routed: RoutedLowRank | None = None
    rotate_in: torch.Tensor | None = None
    turn: Turn | None = None
    sparse: Sparse | None = None
    gated: GatedLowRank | None = None
    joint: JointPrefix | None = None
    prefix_gate: torch.Tensor | None = None
    bottleneck: Bottleneck | None = None
    fusion: Fusion | None = None

    side: SideLayer | None = None
    network: SideNetwork | None = None

    @property
    def rank(self) -> int:
        """Of the low-rank update, of all experts together."""
        return sum(form.rank for form in (self.low_rank, self.routed, self.gated, self.side) if form is not None)

    @property
    def has_gates(self) -> bool:
        """Some gate is the mean over a prompt."""
        bottleneck = self.bottleneck is not None and self.bottleneck.gate is not None
        return bottleneck or self.gated is not None or self.prefix_gate is not None

    def parts(self) -> dict[Part, torch.Tensor]:
        """The rows ``[count, width]`` of every part there is."""
        parts: dict[Part, torch.Tensor] = {}
        for name in (own.name for own in fields(self)):
            form = getattr(self, name)
            if isinstance(form, torch.Tensor):  # a part of its own name
                parts[Part(name)] = form.unsqueeze(0) if form.ndim == 1 else form
            elif form is not None:
                parts |= form.parts()
        return parts

    def numbers(self) -> dict[Part, int]:
        """What goes with a part and is no row: how many experts are chosen, how far pairs lie apart, a gate's link."""
        numbers: dict[Part, int] = {}
        if self.routed is not None:
            numbers[Part.PROTOTYPES] = self.routed.top_k
        if self.turn is not None:
            numbers[Part.TURN] = self.turn.distance
        if self.prefix_gate is not None:
            numbers[Part.PREFIX_GATE] = Link.SIGMOID
        for form in (self.gated, self.bottleneck):
            if form is not None and form.gate is not None:
                numbers[Part.GATE] = form.gate.link
        return numbers

    @property
    def names(self) -> tuple[str, ...]:
        """The forms present, by name, as shown to users."""
        present = (_NAMES[field.name] for field in fields(self) if getattr(self, field.name) is not None)
        return tuple(dict.fromkeys(present))


_NAMES = {
    "low_rank": "LowRank",
    "gain_in": "Gain",
    "gain_out": "Gain",
    "shift": "Bias",
    "delta": "Delta",
    "rows": "Replace",
    "weight": "Replace",
    "bias": "Replace",
    "prefix": "GatedPrefix",
    "routed": "RoutedLowRank",
    "rotate_in": "Rotation",
    "turn": "Turn",
    "sparse": "Sparse",
    "gated": "GatedLowRank",
    "joint": "JointPrefix",
    "prefix_gate": "JointPrefix",
    "bottleneck": "Bottleneck",
    "fusion": "Fusion",
    "side": "SideNetwork",
    "network": "SideNetwork",
}


@dataclass(frozen=True)
class SoftPrompt:
    """Embeddings in front of the prompt: tokens without a word. Their keys and values never depend on the request.

    Attributes:
        embeddings: ``[n, hidden]``, what the model's embedding would return for them.
    """

    embeddings: torch.Tensor

    @property
    def length(self) -> int:
        return self.embeddings.shape[0]

    @property
    def position_offset(self) -> int:
        """Position of the first real token."""
        return self.length

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values in front of a row's own, in every layer.

    Attributes:
        keys, values: per layer ``[n, kv_heads, head_dim]``, as attention sees them: keys are not rotated any more.
        position_offset: position of the first real token.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    position_offset: int

    @property
    def length(self) -> int:
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


Prompt = SoftPrompt | PrefixKV
"""What stands in front of every prompt of an adapter."""


@dataclass(frozen=True)
class CompiledAdapter:
    """An adapter read, checked in full and reduced to forms.

    Attributes:
        version: digest of the adapter's content, its identity everywhere past the loader.
        method: how it was trained, for people to read ("LORA").
        sites: forms by the path of the base's module, as in ``model.named_modules()``, or of experts' parameter.
        prompt: what stands in front of every prompt, if anything.
        choices: what requests choose. The forms are those of one choice: the default, or the lowest.
        invocation: tokens from whose last occurrence in a prompt on the adapter works; empty: from the first token on.
        whole_prompts: a prompt must be computed in one pass, because gates are means over it; follows from the sites.
    """

    version: str
    method: str
    sites: Mapping[str, SiteForms]
    prompt: Prompt | None = None
    choices: tuple[Choice, ...] = ()
    invocation: tuple[int, ...] = ()
    whole_prompts: bool = False

    def __post_init__(self) -> None:
        if any(forms.has_gates for forms in self.sites.values()):
            object.__setattr__(self, "whole_prompts", True)

    @property
    def outline(self) -> CompiledAdapter:
        """All of it but its sites: small enough to be kept for as long as the adapter is known."""
        return replace(self, sites={})

    @property
    def rank(self) -> int:
        """The largest rank at any site."""
        return max((forms.rank for forms in self.sites.values()), default=0)

    @property
    def nbytes(self) -> int:
        sites = sum(rows.nbytes for forms in self.sites.values() for rows in forms.parts().values())
        return sites + (self.prompt.nbytes if self.prompt else 0)

    @property
    def forms(self) -> tuple[str, ...]:
        """The distinct forms used, in order of first use."""
        prompt = (type(self.prompt).__name__,) if self.prompt else ()
        return tuple(dict.fromkeys((*prompt, *(name for forms in self.sites.values() for name in forms.names))))
