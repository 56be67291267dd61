"""Tokens that the host does not know yet, because the step that samples them is still under way on the device.

In ``Sequence.tokens`` such a token is ``~index``, which is negative: the ``index``-th of those that the step under way
samples. Counts and pages are right with it. Whatever needs the token itself gets it on the device, from that step's own
tensor, and nobody waits. When a step is launched there is one under way at most, so it is clear which one is meant.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from weft.kernels.groups import to_device


def placeholder(index: int) -> int:
    """What stands for the ``index``-th token of the step under way."""
    return ~index


def is_pending(token: int) -> bool:
    """Whether it stands for a token that is not known yet."""
    return token < 0


def to_ids(tokens: Collection[int], sampled: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """int64 ``[len(tokens)]`` on the device, with the tokens in the places of their placeholders; waits for nothing.

    Args:
        sampled: int64, the tokens of the step under way, which may not be there yet; None: there is none.
    """
    host = np.fromiter(tokens, np.int64, count=len(tokens))
    ids = to_device(host, device)
    if not len(host) or host.min() >= 0:
        return ids
    assert sampled is not None, "a token is awaited of no step"
    return torch.where(ids < 0, sampled.index_select(0, (~ids).clamp_min(0)), ids)
