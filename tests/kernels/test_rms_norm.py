import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.rms_norm import reference, rms_norm, triton
from weft.kernels.testing import TOLERANCES, assert_close

FORMULAS = ((0.0, True), (0.0, False), (1.0, False))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [rms_norm, triton.rms_norm])


@IMPLEMENTATIONS
@given(
    rows=st.sampled_from([1, 3, 40]),
    width=st.sampled_from([1, 16, 20, 80, 96, 5000]),
    formula=st.sampled_from(FORMULAS),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, rows, width, formula, size, dtype) -> None:
    x, weight = rows_of(width, rows, dtype, strided=False, seed=1) * size, torch.randn(width).to(dtype)
    options = {"eps": 1e-6, "offset": formula[0], "round_first": formula[1]}
    y = implementation(x, weight, **options)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    assert_close(y, reference.rms_norm(x, weight, **options))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_reference_is_the_formula(formula, dtype) -> None:
    x, weight = torch.randn(5, 7).to(dtype), torch.randn(7).to(dtype)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
    normed = normed.to(dtype).double() if formula[1] else normed
    y = reference.rms_norm(x, weight, 0.1, offset=formula[0], round_first=formula[1])
    assert_close(y, (normed * (formula[0] + weight.double())).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_and_strided_rows_are_normalised_one_by_one(dtype) -> None:
    options = {"eps": 1e-5, "offset": 0.0, "round_first": True}
    weight = torch.randn(20).to(dtype)
    heads = torch.randn(2, 3, 4, 20).to(dtype).transpose(1, 2)
    for x in (
        heads,
        rows_of(20, 9, dtype, strided=True, seed=1),
        torch.randn(20, 6).to(dtype).T,
        heads[:0],
        heads[0, 0, 0],
    ):
        y = rms_norm(x, weight, **options)
        assert_close(y, reference.rms_norm(x, weight, **options))
        alone = [rms_norm(row, weight, **options) for row in x.reshape(-1, 20)]
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(y.reshape(-1, 20), alone, strict=True))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_nan_stays_in_its_row(implementation, dtype) -> None:
    x, weight = torch.randn(4, 20).to(dtype), torch.randn(20).to(dtype)
    y = implementation(x, weight, 1e-6, offset=0.0, round_first=True)
    x[1, 17] = float("nan")
    broken = implementation(x, weight, 1e-6, offset=0.0, round_first=True)
    assert torch.equal(bits(broken[[0, 2, 3]]), bits(y[[0, 2, 3]])) and broken[1].isnan().all()


def test_many_rows_are_shared_between_threads() -> None:
    x, weight = torch.randn(700, 96).bfloat16(), torch.randn(96).bfloat16()
    y = rms_norm(x, weight, 1e-6, offset=1.0, round_first=False)
    assert_close(y, reference.rms_norm(x, weight, 1e-6, offset=1.0, round_first=False))


def test_what_does_not_fit_is_refused() -> None:
    for weight in (torch.zeros(5), torch.zeros(6, dtype=torch.bfloat16), torch.zeros(1, 6)):
        with pytest.raises(ValueError, match=r"x \(2, 6\) torch\.float32 does not fit a weight"):
            rms_norm(torch.zeros(2, 6), weight, 1e-6, offset=0.0, round_first=True)
