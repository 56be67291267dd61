import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.grouped_delta import grouped_delta, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


@pytest.mark.parametrize("implementation", [grouped_delta, triton.grouped_delta])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    has=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
    width_in=st.integers(1, 300),
    width_out=st.integers(1, 150),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(implementation, slots, has, width_in, width_out, dtype, strided) -> None:
    y = rows_of(width_out, len(slots), dtype, strided=strided, seed=1)
    x = rows_of(width_in, len(slots), dtype, strided=strided, seed=2)
    delta = random_rows([width_out * there for there in has], width_in, dtype, scale=width_in**-0.5)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    before, expected = y.clone(), y.clone()
    reference.grouped_delta(expected, x, delta, groups)
    implementation(y, x, delta, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not has[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


def test_the_reference_is_the_formula() -> None:
    slots, delta = [1, -1, 0, 1], random_rows([5, 5], 3, torch.float32)
    y = rows_of(5, 4, torch.float32, strided=False, seed=1)
    x = rows_of(3, 4, torch.float32, strided=False, seed=2)
    expected = y.double()
    for t, slot in enumerate(slots):
        for n in range(5 if slot >= 0 else 0):
            expected[t, n] += delta.pool[delta.table[slot, n]].double() @ x[t].double()
    reference.grouped_delta(y, x, delta, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


def test_what_does_not_fit_is_refused() -> None:
    groups, delta = RowGroups.build([0, 0], "cpu"), random_rows([4], 3, torch.float32)
    y, x = torch.zeros(2, 4), torch.zeros(2, 3)
    for wrong in ((y[:1], x), (y, x[:1]), (y, y), (torch.zeros(2, 5), x)):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_delta(*wrong, delta, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_delta(y.half(), x, delta, groups)
