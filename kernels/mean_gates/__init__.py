"""Mean gates: numbers that an adapter weighs its own updates by, each the mean of something over a span of tokens.

*Semantics*, for every row t whose slot s has n > 0 gates, with P the tokens of t's span:

    g[t] = 1/|P| sum_{p in P} link[s](W[s] x[p] + b[s])     sigmoid of each gate, or softmax over them

All of it in fp32. Where a slot has no gates, or fewer than others, g is 1. The gates of UniPELT (arXiv 2110.07577) and
of Lily (2407.09946), whose forward pass is one span.
"""

from enum import IntEnum

from torch import Tensor

from weft.kernels.dispatch import backend
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.spans import Spans

from . import reference

__all__ = ["MAX_GATES", "Link", "mean_gates"]

MAX_GATES = 64
"""Gates of a slot that one tile's scores have room for."""


class Link(IntEnum):
    """What makes weights of scores."""

    SIGMOID = 1
    SOFTMAX = 2


def mean_gates(x: Tensor, gates: SlotRows, links: Tensor, spans: Spans, groups: RowGroups) -> Tensor:
    """The gates of each row.

    Args:
        x: [T, in] fp32, bf16 or fp16; rows may be strided, a row is contiguous.
        gates: rows of width in and the same dtype: those of W, and one more that begins with b.
        links: int32 [slots] on the device, of `Link` where a slot has gates.
        spans: of the T tokens.
        groups: the rows of this step.

    Returns:
        fp32 [T, n], contiguous, n the most gates of a slot.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    most = gates.max_count - 1
    if x.shape != (groups.num_rows, gates.width) or len(spans.ids) != groups.num_rows:
        raise ValueError(
            f"x {tuple(x.shape)} and spans of {len(spans.ids)} tokens do not fit {groups.num_rows} rows and gates of "
            f"width {gates.width}"
        )
    if not 1 <= most <= min(MAX_GATES, gates.width) or 1 in gates.host_counts:
        raise ValueError(f"slots have {gates.host_counts} rows: a row for each gate, at most {MAX_GATES}, and one more")
    if x.dtype != gates.pool.dtype:
        raise ValueError(f"x {x.dtype}, gates {gates.pool.dtype}: dtypes must be equal")
    if backend(x) == "triton":
        from .triton import mean_gates as launch

        return launch(x, gates, links, spans, groups)
    return reference.mean_gates(x, gates, links, spans, groups)
