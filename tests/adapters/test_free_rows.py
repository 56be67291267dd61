"""Rows taken and given back in any order are never lost and never handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.free_rows import FreeRows, runs_of


@given(st.data())
def test_any_order_of_takes_and_returns(data: st.DataObject) -> None:
    free, held = FreeRows(40), list[list[int]]()
    for _ in range(data.draw(st.integers(0, 30))):
        if held and data.draw(st.booleans()):
            chosen = {data.draw(st.integers(0, len(held) - 1)) for _ in range(2)}
            free.give_back([row for index in chosen for row in held[index]])
            held = [rows for index, rows in enumerate(held) if index not in chosen]
        elif len(free):
            rows = free.take(data.draw(st.integers(1, len(free))))
            assert rows == sorted(set(rows))
            held.append(rows)
        taken = [row for rows in held for row in rows]
        assert len(free) == 40 - len(taken) == 40 - len(set(taken))
        free.check_tiles(taken)


def test_adjacent_rows_where_there_are_any() -> None:
    free = FreeRows(10)
    first, _, third = free.take(2), free.take(2), free.take(6)
    free.give_back(first + third)
    assert free.take(5) == [4, 5, 6, 7, 8]
    assert free.take(3) == [0, 1, 9]


def test_what_is_wrong_is_noticed() -> None:
    free = FreeRows(5)
    rows = free.take(3)
    for wrong in ([], rows[:2], [*rows, 4], [*rows, rows[0]]):
        with pytest.raises(AssertionError, match="lost or held twice"):
            free.check_tiles(wrong)


def test_runs() -> None:
    assert runs_of([5, 1, 2, 3, 7]) == [(1, 4), (5, 6), (7, 8)]
    assert runs_of([]) == []
