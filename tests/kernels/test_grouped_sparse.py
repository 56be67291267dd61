import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.grouped_sparse import grouped_sparse, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.sparse_rows import pack_rows, unpack_rows
from weft.kernels.testing import TOLERANCES, assert_close, random_rows, random_sparse

SLOTS = 4


@pytest.mark.parametrize("implementation", [grouped_sparse, triton.grouped_sparse])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    densities=st.lists(st.sampled_from([0, 1e-9, 0.01, 0.1, 0.6, 1]), min_size=SLOTS, max_size=SLOTS),
    width_in=st.integers(1, 60).map(lambda half: 2 * half),
    width_out=st.integers(1, 90),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, slots, densities, width_in, width_out, dtype, strided) -> None:
    y = rows_of(width_out, len(slots), dtype, strided=strided, seed=1)
    x = rows_of(width_in, len(slots), dtype, strided=strided, seed=2)
    sparse = random_sparse(densities, width_in, width_out, dtype)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    before, expected = y.clone(), y.clone()
    reference.grouped_sparse(expected, x, sparse, groups)
    implementation(y, x, sparse, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not densities[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))
    if y._base is not None:
        assert y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


def test_the_reference_is_the_formula() -> None:
    starts, columns = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([3, 0, 1, 2, 3], dtype=torch.int32)
    values = torch.randn(5)
    rows = pack_rows(starts, columns, values, 4)
    sparse = random_rows([0, len(rows)], 4, torch.float32)
    sparse.pool[sparse.table[1].long()] = rows
    y, x = rows_of(3, 3, torch.float32, strided=False, seed=1), rows_of(4, 3, torch.float32, strided=False, seed=2)
    expected = y.double()
    for t in (0, 2):
        for n in range(3):
            for e in range(int(starts[n]), int(starts[n + 1])):
                expected[t, n] += values[e].double() * x[t, columns[e]].double()
    reference.grouped_sparse(y, x, sparse, RowGroups.build([1, -1, 1], "cpu"))
    assert_close(y, expected.float())


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("count", [0, 1, 12, 13])
def test_rows_hold_integers_bit_for_bit(dtype: torch.dtype, count: int) -> None:
    starts = torch.tensor([0, 0, count, count], dtype=torch.int32)
    columns, values = torch.arange(1 << 30, (1 << 30) + count, dtype=torch.int32), torch.randn(count).to(dtype)
    rows = pack_rows(starts, columns, values, 6)
    assert rows.shape[1] == 6 and rows.dtype == dtype
    for found, put in zip(unpack_rows(rows, 3), (starts, columns, values), strict=True):
        assert found.equal(put)


def test_what_does_not_fit_is_refused() -> None:
    groups, sparse = RowGroups.build([0, 0], "cpu"), random_sparse([0.5], 4, 6, torch.float32)
    y, x = torch.zeros(2, 6), torch.zeros(2, 4)
    for wrong in ((y[:1], x), (y, x[:1]), (y, y)):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_sparse(*wrong, sparse, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_sparse(y.half(), x, sparse, groups)
    odd = random_rows([2], 5, torch.float16)
    with pytest.raises(ValueError, match="no whole number"):
        grouped_sparse(y.half(), torch.zeros(2, 5).half(), odd, groups)
