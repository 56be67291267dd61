import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.grouped_turn import grouped_turn, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


@st.composite
def turns(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A width, and the distance of each slot's pairs, 0 where there are none."""
    width = 2 * draw(st.integers(1, 90)) * draw(st.sampled_from([1, 4, 16]))
    distances = st.sampled_from([0, *(n for n in range(1, width // 2 + 1) if width % (2 * n) == 0)])
    return width, draw(st.lists(distances, min_size=SLOTS, max_size=SLOTS))


@pytest.mark.parametrize("implementation", [grouped_turn, triton.grouped_turn])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    turn=turns(),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, slots, turn, dtype, strided) -> None:
    width, distances = turn
    y = rows_of(width, len(slots), dtype, strided=strided, seed=1)
    rows = random_rows([2 * (d > 0) for d in distances], width, dtype)
    groups, by_slot = RowGroups.build(slots, "cpu"), torch.tensor(distances, dtype=torch.int32)
    before, expected = y.clone(), y.clone()
    reference.grouped_turn(expected, rows, by_slot, groups)
    implementation(y, rows, by_slot, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not distances[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))
    if y._base is not None:
        assert y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


def test_the_reference_is_the_formula() -> None:
    slots, distances = [1, -1, 0, 2], torch.tensor([1, 3, 0], dtype=torch.int32)
    turn = random_rows([2, 2, 0], 12, torch.float32)
    y = rows_of(12, 4, torch.float32, strided=False, seed=1)
    before, expected = y.double(), y.double()
    for t, slot in enumerate(slots):
        if slot not in (0, 1):
            continue
        distance = int(distances[slot])
        own, other = (turn.pool[place].double() for place in turn.table[slot, :2])
        for n in range(12):
            partner = n + distance if n % (2 * distance) < distance else n - distance
            expected[t, n] = (1 + own[n]) * before[t, n] + other[n] * before[t, partner]
    reference.grouped_turn(y, turn, distances, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


def test_what_does_not_fit_is_refused() -> None:
    groups, one = RowGroups.build([0, 0], "cpu"), torch.ones(1, dtype=torch.int32)
    turn, y = random_rows([2], 4, torch.float32), torch.zeros(2, 4)
    for wrong in (torch.zeros(2, 6), y.half()):
        with pytest.raises(ValueError, match="does not fit turns"):
            grouped_turn(wrong, turn, one, groups)
    with pytest.raises(ValueError, match=r"turns of \[1\] rows"):
        grouped_turn(y, random_rows([1], 4, torch.float32), one, groups)
    with pytest.raises(ValueError, match="3 rows"):
        grouped_turn(torch.zeros(3, 4), turn, one, groups)
    with pytest.raises(ValueError, match="2 distances"):
        grouped_turn(y, turn, torch.ones(2, dtype=torch.int32), groups)
