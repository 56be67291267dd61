"""A curve in a terminal, in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 60
HEIGHT = 10
POINT, BEST = "•", "─"


def curve(losses: Sequence[float | None], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Losses in the order they were found, a point each, and a line for the best so far; "" where there is none.

    Args:
        losses: None and what is not finite has no point.
        width: columns at most; where there are more losses, a column has the best of several.
    """
    known = [loss if loss is not None and math.isfinite(loss) else math.inf for loss in losses]
    each = max(1, math.ceil(len(known) / width))
    columns = [min(known[at : at + each]) for at in range(0, len(known), each)]
    finite = [loss for loss in columns if math.isfinite(loss)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    step = (high - low) / (height - 1) or 1.0

    def row(loss: float) -> int:
        return height - 1 - round((loss - low) / step)

    grid = [[" "] * len(columns) for _ in range(height)]
    best = math.inf
    for column, loss in enumerate(columns):
        best = min(best, loss)
        if math.isfinite(best):
            grid[row(best)][column] = BEST
        if math.isfinite(loss):
            grid[row(loss)][column] = POINT
    labels = [f"{high - index * step:9.4f}" if index in (0, height - 1) else " " * 9 for index in range(height)]
    lines = [f"{label} │{''.join(cells).rstrip()}" for label, cells in zip(labels, grid, strict=True)]
    return "\n".join([*lines, f"{'':9} └{'─' * len(columns)}", f"{'':11}1{len(known):>{max(1, len(columns) - 1)}}"])
