"""What the forms of an adapter are made of: updates of one site, and the rows of memory they are kept in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch

from weft.kernels.mean_gates import Link
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
    GATE = "gate"
    GATED_A = "gated_a"
    GATED_B = "gated_b"
    PREFIX_GATE = "prefix_gate"
    VALUES_JOINT = "values_joint"
    GATE_DOWN = "gate_down"
    GATE_DOWN_BIAS = "gate_down_bias"
    GATE_UP = "gate_up"
    GATE_UP_BIAS = "gate_up_bias"
    NETWORK = "network"

    @property
    def of_input(self) -> bool:
        """Rows are as wide as the site's input; else as its output."""
        return self in _OF_INPUT


_OF_INPUT = frozenset(
    (
        *(Part.A, Part.GAIN_IN, Part.ROTATE_IN, Part.DELTA, Part.SPARSE, Part.EXPERT_A, Part.PROTOTYPES),
        *(Part.GATE, Part.GATED_A, Part.PREFIX_GATE),
    )
)


@dataclass(frozen=True)
class LowRank:
    """``y += B (A x)`` at one linear site.

    Attributes:
        a: ``[r, in]``; of experts ``[experts * r, in]``, those of one expert together.
        b: ``[out, r]``; of experts ``[out, experts * r]`` likewise. Every scale of the method is folded in.
        experts: at a parameter that holds a linear for each expert, how many; 1 elsewhere.
        scale: the factors are LoRA's own, as they were trained, but for this scale in ``b``; None: they are made of
            something else.
    """

    a: torch.Tensor
    b: torch.Tensor
    experts: int = field(default=1, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)

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
class Gate:
    """Numbers ``g``, the mean of ``link(W x + b)`` over a span of tokens: all of a prompt, and each later token alone.

    Attributes:
        weight: W ``[gates, in]``.
        bias: b ``[gates]``; there are no more gates than the input is wide.
        link: the sigmoid of each score, or the softmax over them.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    link: Link

    def rows(self) -> torch.Tensor:
        """W, and b as a row more, filled up with zeros."""
        padded = torch.nn.functional.pad(self.bias, (0, self.weight.shape[1] - len(self.bias)))
        return torch.cat([self.weight, padded.unsqueeze(0)])


@dataclass(frozen=True)
class GatedLowRank:
    """``y += sum_e g_e B_e (A_e x)`` over the gates of a site.

    Attributes:
        a: ``[gates * r, in]``, one gate's rows after the other's; or ``[r, in]``, the same of all.
        b: ``[out, gates * r]``; every scale is folded in.
    """

    a: torch.Tensor
    b: torch.Tensor
    gate: Gate

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.GATED_A: self.a, Part.GATED_B: self.b.T, Part.GATE: self.gate.rows()}


@dataclass(frozen=True)
class JointPrefix:
    """Keys and values that join those of a row's own tokens in one softmax, at the layer's output projection.

    Keys are multiplied by the first of the two gates that the layer's queries are made with (``SiteForms.prefix_gate``)
    and values by the second.

    Attributes:
        keys, values: ``[n, kv_heads * head_dim]``; keys are not rotated.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def parts(self) -> dict[Part, torch.Tensor]:
        return {Part.KEYS: self.keys, Part.VALUES_JOINT: self.values}


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
