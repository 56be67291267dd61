"""The runtime forms adapters compile to. No method's name is known past its loader.

At a linear site with weight W and bias b0, a row x of the batch becomes

    y = gain_out * (W (gain_in * x) + b0) + shift + B (A x) + D x

where everything but W and b0 is the adapter's own, and what it has not is left out. In place of B (A x) there may be
several such products, weighed by what x is. Behind attention, what the layer's
queries find in a gated prefix is added to x or to y. At a norm the adapter's own weight
and bias stand in for the base's. The base is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

import torch

from weft.adapters.choices import Choice


class Part(StrEnum):
    """A kind of rows that an adapter keeps at a site, and which of the site's widths they have."""

    A = "a"
    B = "b"
    GAIN_IN = "gain_in"
    GAIN_OUT = "gain_out"
    SHIFT = "shift"
    DELTA = "delta"
    ROWS = "rows"
    WEIGHT = "weight"
    BIAS = "bias"
    KEYS = "keys"
    VALUES_IN = "values_in"
    VALUES_OUT = "values_out"
    EXPERT_A = "expert_a"
    EXPERT_B = "expert_b"
    PROTOTYPES = "prototypes"

    @property
    def of_input(self) -> bool:
        """Rows are as wide as the site's input; else as its output."""
        return self in (Part.A, Part.GAIN_IN, Part.DELTA, Part.EXPERT_A, Part.PROTOTYPES)


@dataclass(frozen=True)
class LowRank:
    """``y += B (A x)`` at one linear site.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``; every scale of the method is folded in.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding, or of the head, that stand in for the base's.

    Attributes:
        ids: int64 ``[n]``, tokens, ascending.
        vectors: ``[n, hidden]``; an embedding's as the module returns them.
    """

    ids: torch.Tensor
    vectors: torch.Tensor


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
class SiteForms:
    """What one adapter does at one site of the base; see the formula above.

    Attributes:
        low_rank: the low-rank update, if any.
        gain_in: ``[in]``, scales the input of W alone.
        gain_out: ``[out]``, scales what the base computes, its bias included.
        shift: ``[out]``, added to that.
        delta: ``[out, in]``, an update of W without a cheaper structure.
        rows: of an embedding or the head.
        weight, bias: ``[out]``, of a norm, in place of the base's.
        prefix: of the output projection of an attention layer.
        routed: low-rank updates weighed by each row's input.
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

    @property
    def rank(self) -> int:
        """Of the low-rank update, of all experts together."""
        return sum(form.rank for form in (self.low_rank, self.routed) if form is not None)

    def parts(self) -> dict[Part, torch.Tensor]:
        """The rows ``[count, width]`` of every part there is."""
        parts: dict[Part, torch.Tensor] = {}
        if self.low_rank is not None:
            parts |= {Part.A: self.low_rank.a, Part.B: self.low_rank.b.T}
        for part in (Part.GAIN_IN, Part.GAIN_OUT, Part.SHIFT, Part.WEIGHT, Part.BIAS):
            row = getattr(self, part)
            if row is not None:
                parts[part] = row.unsqueeze(0)
        if self.delta is not None:
            parts[Part.DELTA] = self.delta
        if self.rows is not None:
            parts[Part.ROWS] = self.rows.vectors
        for form in (self.prefix, self.routed):
            if form is not None:
                parts |= form.parts()
        return parts

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
        sites: forms by the path of the base's module, as in ``model.named_modules()``.
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
