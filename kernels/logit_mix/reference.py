"""The meaning of the logit mix: one term after the other in fp32; the CPU path."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from weft.kernels.logit_mix import MixTerms


def logit_mix(out: Tensor, source: Tensor, terms: "MixTerms") -> None:
    """See `weft.kernels.logit_mix.logit_mix`."""
    for mixed, mine, width in zip(out, terms.terms, terms.host_widths, strict=True):
        for row, weight in mine:
            mixed[:width].add_(source[row, :width], alpha=weight)
