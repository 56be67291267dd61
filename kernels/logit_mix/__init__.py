"""Logit mix: weighed sums of rows of logits, as many of them for each output row as it asks for.

*Semantics*, for every output row t and token v below its width:

    out[t, v] = out[t, v] + sum over the terms j of t of weights[j] * source[rows[j], v]

Sums are in fp32. A row with logits of several models gets them model by model, each from its own tensor. Tokens from
the row's width on are left as they are, bit for bit, and what the source holds there is not looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import to_device
from weft.kernels.logit_mix import reference

__all__ = ["MixTerms", "logit_mix"]

Terms = Sequence[Sequence[tuple[int, float]]]
"""For each output row: pairs of a row of the source and its weight."""


@dataclass(frozen=True)
class MixTerms:
    """What each of N output rows adds, as a ragged list.

    Attributes:
        terms: as they were given.
        host_widths: likewise.
        starts: int32 ``[N + 1]``, where each row's terms begin.
        rows: int32 ``[P]``, of the source. weights: fp32 ``[P]``.
        widths: int32 ``[N]``, tokens of each row.
    """

    terms: Terms
    host_widths: Sequence[int]
    starts: Tensor
    rows: Tensor
    weights: Tensor
    widths: Tensor

    @classmethod
    def build(cls, terms: Terms, widths: Sequence[int], device: torch.device | str) -> "MixTerms":
        """Raises ValueError unless there is a width for every row."""
        if len(terms) != len(widths):
            raise ValueError(f"{len(terms)} rows of terms, {len(widths)} widths")
        starts = np.cumsum([0, *map(len, terms)]).astype(np.int32)
        flat = [term for mine in terms for term in mine]
        rows = np.array([row for row, _ in flat], dtype=np.int32)
        weights = np.array([weight for _, weight in flat], dtype=np.float32)
        return cls(
            terms,
            widths,
            to_device(starts, device),
            to_device(rows, device),
            to_device(weights, device),
            to_device(np.array(widths, dtype=np.int32), device),
        )


def logit_mix(out: Tensor, source: Tensor, terms: MixTerms) -> None:
    """Adds to the rows of out in place.

    Args:
        out: [N, width] fp32; rows may be strided, a row is contiguous.
        source: [M, width'] fp32, likewise; rows with terms are at most as wide as the narrower of the two.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if out.dtype != torch.float32 or source.dtype != torch.float32:
        raise ValueError(f"logits are mixed in float32, not {source.dtype} into {out.dtype}")
    widest = max((width for width, mine in zip(terms.host_widths, terms.terms, strict=True) if mine), default=0)
    last = max((row for mine in terms.terms for row, _ in mine), default=-1)
    if len(terms.terms) != out.shape[0] or widest > min(out.shape[1], source.shape[1]) or last >= source.shape[0]:
        raise ValueError(
            f"{len(terms.terms)} rows up to {widest} wide, of source rows up to {last}, do not fit {tuple(out.shape)} "
            f"and {tuple(source.shape)}"
        )
    if last < 0:
        return
    if backend(out) == "triton":
        from .triton import logit_mix as launch

        launch(out, source, terms)
    else:  # one fused pass per term is what memory allows
        reference.logit_mix(out, source, terms)
