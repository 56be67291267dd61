"""Tokens of a flat batch cut into spans: what a gate is the mean over. Built once per step on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.kernels.groups import to_device


@dataclass(frozen=True, eq=False)
class Spans:
    """S spans that follow each other and hold all T tokens; every token of a span has the same adapter.

    Attributes:
        bounds: int32 [S + 1] on the device; span i has the tokens from `bounds[i]` up to `bounds[i + 1]`.
        ids: int64 [T] on the device, the span of each token.
        rows: on the host, the rows of the batch whose adapters have gates; what spans other rows have is of no matter.
    """

    bounds: Tensor
    ids: Tensor
    rows: tuple[int, ...]

    @classmethod
    def build(cls, lengths: Sequence[int], rows: Sequence[int], device: torch.device | str) -> "Spans":
        """Spans of these lengths, none of them 0; the copies to `device` are asynchronous."""
        counts = np.asarray(lengths, dtype=np.int64)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        ids = np.repeat(np.arange(len(counts)), counts)
        return cls(to_device(bounds, device), to_device(ids, device), tuple(rows))

    @property
    def count(self) -> int:
        return self.bounds.shape[0] - 1
