import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.grouped_rotate import grouped_rotate, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


@st.composite
def rotations(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A width, and the size of each slot's blocks: a divisor of it, or 0."""
    width = draw(st.integers(1, 20)) * draw(st.sampled_from([1, 4, 6, 16]))
    sizes = st.sampled_from([0, *(n for n in range(1, width + 1) if width % n == 0)])
    return width, draw(st.lists(sizes, min_size=SLOTS, max_size=SLOTS))


@pytest.mark.parametrize("implementation", [grouped_rotate, triton.grouped_rotate])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    rotation=rotations(),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, slots, rotation, dtype, strided) -> None:
    width, sizes = rotation
    x = rows_of(width, len(slots), dtype, strided=strided, seed=1)
    y = rows_of(width, len(slots), dtype, strided=strided, seed=2)
    rows = random_rows(sizes, width, dtype, scale=max([1, *sizes]) ** -0.5)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    before, expected = y.clone(), y.clone()
    reference.grouped_rotate(expected, x, rows, groups)
    implementation(y, x, rows, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not sizes[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))
    if y._base is not None:
        assert y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


def test_the_reference_is_the_formula() -> None:
    slots, sizes = [1, -1, 0, 1, 2], [2, 3, 0]
    rotation = random_rows(sizes, 6, torch.float32)
    y, x = (rows_of(6, 5, torch.float32, strided=False, seed=seed) for seed in (1, 2))
    expected = y.double()
    for t, slot in enumerate(slots):
        size = sizes[slot] if slot >= 0 else 0
        for n in range(6):
            for i in range(size):
                row = rotation.pool[rotation.table[slot, i]].double()
                expected[t, n] += x[t, n // size * size + i].double() * row[n]
    reference.grouped_rotate(y, x, rotation, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


def test_what_does_not_fit_is_refused() -> None:
    groups, rotation = RowGroups.build([0, 0], "cpu"), random_rows([2], 4, torch.float32)
    y, x = torch.zeros(2, 4), torch.zeros(2, 4)
    for wrong in ((y[:1], x), (y, x[:1]), (torch.zeros(2, 5), torch.zeros(2, 5))):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_rotate(*wrong, rotation, groups)
    with pytest.raises(ValueError, match=r"rotations of \[3\] rows"):
        grouped_rotate(y, x, random_rows([3], 4, torch.float32), groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_rotate(y.half(), x, rotation, groups)
