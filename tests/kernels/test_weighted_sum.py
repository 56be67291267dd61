import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits
from weft.kernels.testing import TOLERANCES, assert_close
from weft.kernels.weighted_sum import reference, triton, weighted_sum


def case(rows: int, terms: int, width: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """A pool of which some rows are written, some read and all others NaN; what is written, read, and with what."""
    gen = torch.Generator().manual_seed(seed)
    read = max(1, rows * terms // 2)
    places = torch.randperm(rows + read + 3, generator=gen).int()
    where, sources = places[:rows], places[rows : rows + read]
    pool = torch.full((rows + read + 3, width), float("nan"), dtype=dtype)
    pool[sources.long()] = torch.randn(read, width, generator=gen).to(dtype)
    chosen = sources[torch.randint(read, (rows, terms), generator=gen)]
    index = torch.where(torch.rand(rows, terms, generator=gen) < 0.2, torch.tensor(-1, dtype=torch.int32), chosen)
    return pool, where, index.contiguous(), torch.randn(rows, terms, generator=gen)


@pytest.mark.parametrize("implementation", [weighted_sum, triton.weighted_sum])
@given(
    rows=st.integers(1, 20),
    terms=st.integers(1, 20),
    width=st.integers(1, 1500),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(implementation, rows, terms, width, dtype, seed) -> None:
    pool, where, index, weights = case(rows, terms, width, dtype, seed)
    before, expected = pool.clone(), pool.clone()
    reference.weighted_sum(expected, where, expected, index, weights)
    implementation(pool, where, pool, index, weights)
    written = torch.zeros(len(pool), dtype=torch.bool)
    written[where.long()] = True
    assert_close(pool[written], expected[written])
    assert torch.equal(bits(pool[~written]), bits(before[~written]))


@given(rows=st.integers(1, 6), terms=st.integers(1, 6), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_the_reference_is_the_formula(rows, terms, seed) -> None:
    pool, where, index, weights = case(rows, terms, 5, torch.float32, seed)
    expected = torch.zeros(rows, 5, dtype=torch.double)
    for i in range(rows):
        for j in range(terms):
            if index[i, j] >= 0:
                expected[i] += weights[i, j].double() * pool[index[i, j]].double()
    reference.weighted_sum(pool, where, pool, index, weights)
    assert_close(pool[where.long()], expected.float())


@pytest.mark.parametrize("implementation", [reference.weighted_sum, triton.weighted_sum])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_single_term_of_weight_1_is_a_copy(implementation, dtype) -> None:
    source, out = torch.randn(4, 33).to(dtype), torch.zeros(5, 33, dtype=dtype)
    index = torch.tensor([[2], [0]], dtype=torch.int32)
    implementation(out, torch.tensor([4, 1], dtype=torch.int32), source, index, torch.ones(2, 1))
    assert torch.equal(out, torch.stack([torch.zeros(33), source[0], *torch.zeros(2, 33), source[2]]).to(dtype))


def test_what_does_not_fit_is_refused() -> None:
    out, where, index = torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    weights = torch.ones(2, 1)
    with pytest.raises(ValueError, match="rows of 5"):
        weighted_sum(out, where, torch.zeros(3, 5), index, weights)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        weighted_sum(out, where, torch.zeros(3, 4).half(), index, weights)
    with pytest.raises(ValueError, match="2 rows"):
        weighted_sum(out, where, out, index, weights[:1])
    with pytest.raises(ValueError, match=r"torch\.int64"):
        weighted_sum(out, where.long(), out, index, weights)
    weighted_sum(out, where[:0], out, index[:0], weights[:0])
    assert not out.any()
