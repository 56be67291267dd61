import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.grouped_affine import grouped_affine, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 5
COUNTS = st.none() | st.lists(st.integers(0, 1), min_size=SLOTS, max_size=SLOTS)


def some_rows(counts: list[int] | None, width: int, dtype: torch.dtype, seed: int) -> SlotRows | None:
    return None if counts is None else random_rows(counts, width, dtype, seed=seed)


@pytest.mark.parametrize("implementation", [grouped_affine, triton.grouped_affine])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    gains=COUNTS,
    shifts=COUNTS,
    width=st.integers(1, 1500),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(implementation, slots, gains, shifts, width, dtype, strided) -> None:
    y = rows_of(width, len(slots), dtype, strided=strided, seed=1)
    gain, shift = some_rows(gains, width, dtype, 2), some_rows(shifts, width, dtype, 3)
    groups = RowGroups.build(slots, "cpu")
    before, expected = y.clone(), y.clone()
    reference.grouped_affine(expected, gain, shift, groups)
    implementation(y, gain, shift, groups)
    assert_close(y, expected)
    none = [0] * SLOTS
    untouched = [t for t, s in enumerate(slots) if s < 0 or not ((gains or none)[s] or (shifts or none)[s])]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))
    if y._base is not None:
        assert y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


def test_the_reference_is_the_formula() -> None:
    slots = [1, -1, 0, 2, 1]
    gain, shift = random_rows([1, 1, 0], 7, torch.float32), random_rows([0, 1, 1], 7, torch.float32, seed=1)
    y = rows_of(7, 5, torch.float32, strided=False, seed=4)
    expected = y.double()
    for t, slot in enumerate(slots):
        if slot in (0, 1):
            expected[t] *= gain.pool[gain.table[slot, 0]].double()
        if slot in (1, 2):
            expected[t] += shift.pool[shift.table[slot, 0]].double()
    reference.grouped_affine(y, gain, shift, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


def test_what_does_not_fit_is_refused() -> None:
    groups, y = RowGroups.build([0, 0], "cpu"), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="does not fit rows of 5"):
        grouped_affine(y, random_rows([1], 5, torch.float32), None, groups)
    with pytest.raises(ValueError, match=r"does not fit rows of 6 torch\.float16"):
        grouped_affine(y, None, random_rows([1], 6, torch.float16), groups)
    with pytest.raises(ValueError, match="3 rows"):
        grouped_affine(torch.zeros(3, 6), None, None, groups)


def rows_tensor(rows: SlotRows) -> Tensor:
    return rows.gather(range(len(rows.host_counts)))


def test_rows_are_read_back_in_order() -> None:
    rows = random_rows([3, 0, 2], 4, torch.float32)
    assert rows_tensor(rows).equal(torch.cat([rows.of(0), rows.of(2)]))
    assert rows.of(1).shape == (0, 4)
    adjacent = SlotRows(torch.randn(5, 3), torch.tensor([[1, 2, 3]], dtype=torch.int32), torch.tensor([3]), (3,))
    assert adjacent.of(0).data_ptr() == adjacent.pool[1].data_ptr()
