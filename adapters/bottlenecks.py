"""What the forms of a sublayer are made of: bottlenecks, and attention over several of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.adapters.parts import Gate, Part
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Input


@dataclass(frozen=True)
class Bottleneck:
    """``U act(D x + b) + c`` at one sublayer.

    Attributes:
        down: D ``[units, hidden]``. down_bias: b ``[units]``.
        up: U ``[hidden, units]``. up_bias: c ``[hidden]``. Every scale of the method is folded into both.
        input: what x is.
        gate: one, of the same x, that all of it is multiplied by.
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    activation: Activation
    input: Input
    gate: Gate | None = None

    @property
    def units(self) -> int:
        return self.down.shape[0]

    def parts(self) -> dict[Part, torch.Tensor]:
        """All of it as rows ``[count, hidden]``; the last row of ``down_bias`` is filled up with zeros."""
        hidden = self.down.shape[1]
        padded = torch.nn.functional.pad(self.down_bias, (0, -self.units % hidden))
        parts = {
            Part.DOWN: self.down,
            Part.DOWN_BIAS: padded.view(-1, hidden),
            Part.UP: self.up.T,
            Part.UP_BIAS: self.up_bias.unsqueeze(0),
        }
        return parts if self.gate is None else {**parts, Part.GATE: self.gate.rows()}


@dataclass(frozen=True)
class Fusion:
    """Attention of every token over what several bottlenecks make of it, at one sublayer.

    Attributes:
        members: the bottlenecks, all of one input, none of them gated.
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
