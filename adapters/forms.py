"""The runtime forms adapters compile to. No method's name is known past its loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
class SiteForms:
    """What one adapter does at one site of the base.

    Attributes:
        low_rank: the low-rank update, if any.
        bias: ``[out]`` added to the output of the rows, if any.
    """

    low_rank: LowRank | None = None
    bias: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        low_rank = (self.low_rank.a, self.low_rank.b) if self.low_rank else ()
        return low_rank if self.bias is None else (*low_rank, self.bias)

    @property
    def names(self) -> tuple[str, ...]:
        """The forms present, by name, as shown to users."""
        return (("LowRank",) if self.low_rank else ()) + (("Bias",) if self.bias is not None else ())


@dataclass(frozen=True)
class CompiledAdapter:
    """An adapter read, checked in full and reduced to forms.

    Attributes:
        version: digest of the adapter's content, its identity everywhere past the loader.
        method: how it was trained, for people to read ("LORA").
        sites: forms by the path of the base's module, as in ``model.named_modules()``.
    """

    version: str
    method: str
    sites: Mapping[str, SiteForms]

    @property
    def rank(self) -> int:
        """The largest rank at any site."""
        return max((forms.low_rank.rank for forms in self.sites.values() if forms.low_rank), default=0)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for forms in self.sites.values() for t in forms.tensors())

    @property
    def forms(self) -> tuple[str, ...]:
        """The distinct forms used, in order of first use."""
        return tuple(dict.fromkeys(name for forms in self.sites.values() for name in forms.names))
