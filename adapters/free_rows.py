"""Which rows of a pool are free, as runs of adjacent ones: a pool has millions of rows and few runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

Run = tuple[int, int]
"""Rows ``start .. stop - 1``."""


class FreeRows:
    """The free rows among ``0 .. capacity - 1``.

    Invariant: runs ascend, are not empty, and no two of them touch.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._runs: list[Run] = [(0, capacity)] if capacity else []
        self._free = capacity

    def __len__(self) -> int:
        return self._free

    def take(self, count: int) -> list[int]:
        """``count`` rows, ascending; adjacent if there are as many in one run. There must be as many."""
        at = next((i for i, (start, stop) in enumerate(self._runs) if stop - start >= count), 0)
        rows: list[int] = []
        while len(rows) < count:
            start, stop = self._runs[at]
            end = min(stop, start + count - len(rows))
            rows.extend(range(start, end))
            if end == stop:
                del self._runs[at]
            else:
                self._runs[at] = (end, stop)
        self._free -= count
        return rows

    def give_back(self, rows: Iterable[int]) -> None:
        """Rows that were taken, in any order."""
        for start, stop in runs_of(rows):
            self._free += stop - start
            at = bisect_left(self._runs, (start, stop))
            if at < len(self._runs) and self._runs[at][0] == stop:
                stop = self._runs.pop(at)[1]
            if at > 0 and self._runs[at - 1][1] == start:
                start = self._runs[at - 1][0]
                at -= 1
                del self._runs[at]
            self._runs.insert(at, (start, stop))

    def check_tiles(self, taken: Iterable[int]) -> None:
        """Raises AssertionError unless every row is free or among ``taken``, once."""
        runs = sorted([*self._runs, *runs_of(taken)])
        assert sum(stop - start for start, stop in runs) == self.capacity, "rows are lost or held twice"
        assert all(left[1] == right[0] for left, right in pairwise(runs)), "rows are lost or held twice"


def runs_of(rows: Iterable[int]) -> list[Run]:
    """Rows as runs, ascending."""
    runs: list[Run] = []
    for row in sorted(rows):
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs
