"""A side network: a small stack of layers beside the base, with keys and values of its own, and how both meet.

For every token the network makes a state s of the base's width. Around a layer of the base, h being the residual stream
before it,

    h' = layer(h + B A (h - s))
    s' = (1 - g) s + g T(h'),  g = sigmoid(G(h'))       T and G are bottlenecks

and s' is the state for the next layer (ShadowPEFT, equations 2 to 7; peft 0.21.2, ``peft.tuners.shadow``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from weft.adapters.bottlenecks import Bottleneck
from weft.adapters.parts import LowRank, Part

GATE = {
    Part.DOWN: Part.GATE_DOWN,
    Part.DOWN_BIAS: Part.GATE_DOWN_BIAS,
    Part.UP: Part.GATE_UP,
    Part.UP_BIAS: Part.GATE_UP_BIAS,
}
"""The parts of G, by what they are of a bottleneck."""


@dataclass(frozen=True)
class SideSizes:
    """What a side network is beside its weights: how it differs from the base's own stack of layers.

    Attributes:
        layers: how many.
        hidden, intermediate, heads: widths and attention heads; None: the base's.
        embeds: it has a token embedding of its own; else it is given the base's vectors.
    """

    layers: int
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    embeds: bool = False


@dataclass(frozen=True)
class SideNetwork:
    """The network's weights.

    Attributes:
        names: of the weights in the stack; the last, ``""``, is the projection ``[base's width, width]``, if any.
        width: the base's.
    """

    sizes: SideSizes
    names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    width: int

    @property
    def shape(self) -> SideShape:
        return SideShape(self.sizes, tuple((n, tuple(w.shape)) for n, w in zip(self.names, self.weights, strict=True)))

    def parts(self) -> dict[Part, torch.Tensor]:
        """All weights as rows ``[count, width]``; the last row of each is filled up with zeros."""
        padded = [pad(weight.flatten(), (0, -weight.numel() % self.width)) for weight in self.weights]
        return {Part.NETWORK: torch.cat(padded).view(-1, self.width)}


@dataclass(frozen=True)
class SideShape:
    """What a side network is beside its tensors, and how they lie in its rows."""

    sizes: SideSizes
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def weights(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights by name, as views of the rows that ``SideNetwork.parts`` laid out."""
        flat, width, at, weights = rows.flatten(), rows.shape[1], 0, {}
        for name, shape in self.shapes:
            count = torch.Size(shape).numel()
            weights[name] = flat[at : at + count].view(shape)
            at += count + -count % width
        return weights


@dataclass(frozen=True)
class SideLayer:
    """What a side network's adapter does around one layer of the base.

    Attributes:
        injection: A ``[r, width]`` and B ``[width, r]``, its strength folded in.
        transform, gate: T and G.
    """

    injection: LowRank
    transform: Bottleneck
    gate: Bottleneck

    @property
    def rank(self) -> int:
        return self.injection.rank

    def parts(self) -> dict[Part, torch.Tensor]:
        gate: Mapping[Part, torch.Tensor] = self.gate.parts()
        return {
            **self.injection.parts(),
            **self.transform.parts(),
            **{GATE[part]: rows for part, rows in gate.items()},
        }
