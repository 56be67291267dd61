import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits
from weft.kernels.logit_mix import MixTerms, logit_mix, reference, triton
from weft.kernels.testing import assert_close

SOURCE_ROWS = 5


@st.composite
def mixes(draw: st.DrawFn) -> tuple[int, int, list[list[tuple[int, float]]], list[int]]:
    """Widths of output and source, each row's terms and its width."""
    out_width, source_width = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    weights = st.floats(-4, 4, width=32)
    terms = st.lists(st.tuples(st.integers(0, SOURCE_ROWS - 1), weights), max_size=4)
    rows = draw(st.lists(terms, max_size=6))
    narrow = min(out_width, source_width)
    return out_width, source_width, rows, [draw(st.integers(1, narrow)) for _ in rows]


def strided(rows: int, width: int, seed: int) -> torch.Tensor:
    """Random rows amid NaN."""
    whole = torch.full((rows, width + 5), float("nan"))
    whole[:, 2 : 2 + width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return whole[:, 2 : 2 + width]


@pytest.mark.parametrize("implementation", [logit_mix, triton.logit_mix])
@given(mix=mixes())
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, mix) -> None:
    out_width, source_width, rows, widths = mix
    terms = MixTerms.build(rows, widths, "cpu")
    out, source = strided(len(rows), out_width, 1), strided(SOURCE_ROWS, source_width, 2)
    before, expected = out.clone(), out.clone()
    reference.logit_mix(expected, source, terms)
    implementation(out, source, terms)
    assert_close(out, expected)
    for t, (mine, width) in enumerate(zip(rows, widths, strict=True)):
        assert torch.equal(bits(out[t, width:]), bits(before[t, width:]))
        if not mine:
            assert torch.equal(bits(out[t]), bits(before[t]))
    assert out._base is None or (out._base[:, :2].isnan().all() and out._base[:, -3:].isnan().all())


def test_the_reference_is_the_formula() -> None:
    rows = [[(1, 1.0), (0, 0.5), (0, -2.0)], [], [(2, -1.0)]]
    out, source = strided(3, 7, 1), strided(3, 9, 2)
    expected = out.double()
    for t, (mine, width) in enumerate(zip(rows, [7, 7, 4], strict=True)):
        for row, weight in mine:
            for v in range(width):
                expected[t, v] += weight * source[row, v].double()
    reference.logit_mix(out, source, MixTerms.build(rows, [7, 7, 4], "cpu"))
    assert_close(out, expected.float())


@pytest.mark.parametrize("implementation", [reference.logit_mix, triton.logit_mix])
def test_a_weight_of_one_copies_and_what_is_no_number_stays_in_its_row(implementation) -> None:
    source = torch.randn(3, 50)
    source[1, 7] = float("nan")
    source[2, 40:] = float("nan")
    out = torch.zeros(3, 50)
    out[2, 40:] = -torch.inf
    implementation(out, source, MixTerms.build([[(0, 1.0)], [(1, 2.0)], [(2, 1.0)]], [50, 50, 40], "cpu"))
    assert torch.equal(out[0], source[0])
    assert out[1].isnan().nonzero().tolist() == [[7]]
    assert torch.equal(out[2, :40], source[2, :40]) and (out[2, 40:] == -torch.inf).all()


def test_what_does_not_fit_is_refused() -> None:
    out, source = torch.zeros(1, 8), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="float32"):
        logit_mix(out.half(), source, MixTerms.build([[(0, 1.0)]], [6], "cpu"))
    for terms, widths in (([[(0, 1.0)]], [7]), ([[(2, 1.0)]], [6]), ([[(0, 1.0)], []], [6, 6])):
        with pytest.raises(ValueError, match="do not fit"):
            logit_mix(out, source, MixTerms.build(terms, widths, "cpu"))
    with pytest.raises(ValueError, match="2 widths"):
        MixTerms.build([[]], [1, 1], "cpu")
