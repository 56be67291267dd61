"""The runtime forms adapters compile to. No method's name is known past its loader.

At a linear site with weight W and bias b0, a row x of the batch becomes

    y = gain_out * T(W ((gain_in * x) R) + b0) + shift + B (A x) + D x + S x

where R, block-diagonal, rotates the input, T turns pairs of outputs, S is sparse, everything but W and b0 is the
adapter's own, and what it has not is left out. In place of B (A x) there may be several such products, weighed by what
x is. Behind attention, what the layer's queries find in a gated prefix is added to x or to y. At a norm the adapter's
own weight and bias stand in for the base's. At the token embedding R rotates the vectors that the base has for the
tokens. A sublayer (attention, feed-forward network) whose output f is added to the residual stream r gives

    f + U act(D x + b) + c                          x = f, r or f + r: a bottleneck
    f + Σ a_n V u_n,  a = softmax_n((Q x + q) · (K u_n + k))       u_n = U_n act_n(D_n x + b_n) + c_n: a fusion

in its place. The base is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

import torch

from weft.adapters.choices import Choice
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Input
from weft.kernels.sparse_rows import pack_rows


class Part(StrEnum):
    """A kind of rows that an adapter keeps at a site, and which of the site's widths they have."""

    A = "a"
    B = "b"
    GAIN_IN = "gain_in"
    ROTATE_IN = "rotate_in"
    TURN = "turn"
    GAIN_OUT = "gain_out"
    SHIFT = "shift"
    DELTA = "delta"
    SPARSE = "sparse"
    ROWS = "rows"
    WEIGHT = "weight"
    BIAS = "bias"
    KEYS = "keys"
    VALUES_IN = "values_in"
    VALUES_OUT = "values_out"
    EXPERT_A = "expert_a"
    EXPERT_B = "expert_b"
    PROTOTYPES = "prototypes"
    DOWN = "down"
    DOWN_BIAS = "down_bias"
    UP = "up"
    UP_BIAS = "up_bias"
    FUSION = "fusion"

    @property
    def of_input(self) -> bool:
        """Rows are as wide as the site's input; else as its output."""
        return self in _OF_INPUT


_OF_INPUT = frozenset((Part.A, Part.GAIN_IN, Part.ROTATE_IN, Part.DELTA, Part.SPARSE, Part.EXPERT_A, Part.PROTOTYPES))


@dataclass(frozen=True)
class LowRank:
    """``y += B (A x)`` at one linear site.

    Attributes:
        a: ``[r, in]``; of experts ``[experts * r, in]``, those of one expert together.
        b: ``[out, r]``; of experts ``[out, experts * r]`` likewise. Every scale of the method is folded in.
        experts: at a parameter that holds a linear for each expert, how many; 1 elsewhere.
    """

    a: torch.Tensor
    b: torch.Tensor
    experts: int = field(default=1, kw_only=True)

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.A: self.a, Part.B: self.b.T}


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding, or of the head, that stand in for the base's.

    Attributes:
        ids: int64 ``[n]``, tokens, ascending.
        vectors: ``[n, hidden]``; an embedding's as the module returns them.
    """

    ids: torch.Tensor
    vectors: torch.Tensor

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.ROWS: self.vectors}


@dataclass(frozen=True)
class RoutedLowRank:
    """``y += sum_e w_e B_e (A_e x)`` over the experts of a site, w being the softmax of ``|P_e x|`` over the ``top_k``
    experts where that is largest, and 0 elsewhere.

    Attributes:
        a: ``[experts * r, in]``, one expert's rows after the other's.
        b: ``[out, experts * r]``; every scale is folded in.
        prototypes: ``[experts, in]``; the temperature is folded in.
        top_k: at most as many as there are experts.
    """

    a: torch.Tensor
    b: torch.Tensor
    prototypes: torch.Tensor
    top_k: int

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.EXPERT_A: self.a, Part.EXPERT_B: self.b.T, Part.PROTOTYPES: self.prototypes}


@dataclass(frozen=True)
class GatedPrefix:
    """Keys and values that a layer's queries attend to in a softmax of their own, at the layer's output projection.

    Attributes:
        keys: ``[n, kv_heads * head_dim]``, not rotated; the scale of the scores is folded in.
        values: likewise; the gate is folded in.
        projected: what the queries find is added to the projection's input, else to its output.
    """

    keys: torch.Tensor
    values: torch.Tensor
    projected: bool

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.KEYS: self.keys, Part.VALUES_IN if self.projected else Part.VALUES_OUT: self.values}


@dataclass(frozen=True)
class Sparse:
    """An update of W that is zero but for few values, which are sorted by output.

    Attributes:
        starts: int32 ``[out + 1]``; output n has the values from ``starts[n]`` up to ``starts[n + 1]``.
        columns: int32 ``[count]``, the input each value belongs to.
        values: ``[count]``.
        width: of the input, even.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    width: int

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.SPARSE: pack_rows(self.starts, self.columns, self.values, self.width)}


@dataclass(frozen=True)
class Turn:
    """Pairs of outputs turned and stretched: ``z[n] + own[n] z[n] + other[n] z[p(n)]``.

    n's partner p(n) is ``distance`` further in the first half of each group of ``2 distance`` outputs, and as much
    before in the second.

    Attributes:
        rows: ``[2, out]``, own and other. Own is less 1, because 16 bits hold a small turn better that way.
        distance: of the elements of a pair.
    """

    rows: torch.Tensor
    distance: int

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.TURN: self.rows}


@dataclass(frozen=True)
class Bottleneck:
    """``U act(D x + b) + c`` at one sublayer.

    Attributes:
        down: D ``[units, hidden]``. down_bias: b ``[units]``.
        up: U ``[hidden, units]``. up_bias: c ``[hidden]``. Every scale of the method is folded into both.
        input: what x is.
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    activation: Activation
    input: Input

    @property
    def units(self) -> int:
        return self.down.shape[0]

    def parts(self) -> dict[Part, torch.Tensor]:
        """All of it as rows ``[count, hidden]``; the last row of ``down_bias`` is filled up with zeros."""
        hidden = self.down.shape[1]
        padded = torch.nn.functional.pad(self.down_bias, (0, -self.units % hidden))
        return {
            Part.DOWN: self.down,
            Part.DOWN_BIAS: padded.view(-1, hidden),
            Part.UP: self.up.T,
            Part.UP_BIAS: self.up_bias.unsqueeze(0),
        }


@dataclass(frozen=True)
class Fusion:
    """Attention of every token over what several bottlenecks make of it, at one sublayer.

    Attributes:
        members: the bottlenecks, all of one input.
        query, key: Q and K ``[hidden, hidden]``. query_bias, key_bias: q and k ``[hidden]``.
        value: V ``[hidden, hidden]``; None: the identity.
    """

    members: tuple[Bottleneck, ...]
    query: torch.Tensor
    query_bias: torch.Tensor
    key: torch.Tensor
    key_bias: torch.Tensor
    value: torch.Tensor | None

    def rows(self) -> torch.Tensor:
        """All of it as rows ``[count, hidden]``, which ``from_rows`` takes apart again."""
        own = [self.query, self.query_bias.unsqueeze(0), self.key, self.key_bias.unsqueeze(0)]
        members = [rows for member in self.members for rows in member.parts().values()]
        return torch.cat(own + ([] if self.value is None else [self.value]) + members)

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.FUSION: self.rows()}

    @property
    def shape(self) -> FusionShape:
        members = tuple((member.units, member.activation) for member in self.members)
        return FusionShape(members, self.members[0].input, self.value is not None)


@dataclass(frozen=True)
class FusionShape:
    """What a fusion is beside its tensors.

    Attributes:
        members: units and activation of each.
        input: of all of them.
    """

    members: tuple[tuple[int, Activation], ...]
    input: Input
    has_value: bool

    def fusion(self, rows: torch.Tensor) -> Fusion:
        """The fusion that ``Fusion.rows`` laid out; its tensors are views of ``rows``."""
        hidden, at = rows.shape[1], 0

        def take(count: int) -> torch.Tensor:
            nonlocal at
            at += count
            return rows[at - count : at]

        query, query_bias, key, key_bias = take(hidden), take(1)[0], take(hidden), take(1)[0]
        value = take(hidden) if self.has_value else None
        members = []
        for units, activation in self.members:
            down, bias = take(units), take(-(-units // hidden)).flatten()[:units]
            members.append(Bottleneck(down, bias, take(units).T, take(1)[0], activation, self.input))
        return Fusion(tuple(members), query, query_bias, key, key_bias, value)


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
        bottleneck, fusion: of a sublayer; not both.
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

    bottleneck: Bottleneck | None = None
    fusion: Fusion | None = None

    @property
    def rank(self) -> int:
        """Of the low-rank update, of all experts together."""
        return sum(form.rank for form in (self.low_rank, self.routed) if form is not None)

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
        """What goes with a part and is no row: how many experts are chosen, how far pairs lie apart."""
        numbers: dict[Part, int] = {}
        if self.routed is not None:
            numbers[Part.PROTOTYPES] = self.routed.top_k
        if self.turn is not None:
            numbers[Part.TURN] = self.turn.distance
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
    "bottleneck": "Bottleneck",
    "fusion": "Fusion",
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
    """

    version: str
    method: str
    sites: Mapping[str, SiteForms]
    prompt: Prompt | None = None
    choices: tuple[Choice, ...] = ()
    invocation: tuple[int, ...] = ()

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
