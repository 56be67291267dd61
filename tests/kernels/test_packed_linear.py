import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.packed_linear import PackedLinear, reference, supported
from weft.kernels.testing import assert_close, without_c

ROWS = st.integers(0, 100) | st.integers(128, 700)  # with few, threads share the outputs
WEIGHT = torch.zeros(4, 4, dtype=torch.bfloat16)
needs_tiles = pytest.mark.skipif(not supported(WEIGHT), reason="this processor has no matrix tiles")


@needs_tiles
@given(ROWS, st.integers(1, 200), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_agrees_with_the_reference(
    rows: int, inputs: int, outputs: int, biased: bool, transposed: bool, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, inputs + 3 * strided, generator=generator).bfloat16()[..., :inputs]
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    weight = weight.T.contiguous().T if transposed else weight
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    y = PackedLinear.pack(weight, bias)(x)
    assert y.shape == (2, rows, outputs)
    assert_close(y, reference.linear(x, weight, bias))


@needs_tiles
def test_is_torchs_own_linear_to_the_bit_but_for_the_order_of_sums() -> None:
    x, weight = torch.randn(40, 768).bfloat16(), torch.randn(320, 768).bfloat16()
    same = PackedLinear.pack(weight, None)(x) == torch.nn.functional.linear(x, weight)
    assert same.float().mean() > 0.99


@needs_tiles
def test_what_is_not_a_number_stays_in_its_row() -> None:
    x, weight = torch.ones(3, 40).bfloat16(), torch.ones(40, 40).bfloat16()
    x[1, 7] = float("nan")
    y = PackedLinear.pack(weight, None)(x)
    assert y[1].isnan().all() and (y[[0, 2]] == 40).all()


@needs_tiles
def test_what_does_not_fit_is_refused() -> None:
    packed = PackedLinear.pack(WEIGHT, None)
    for x in (torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="does not fit a bf16 linear of 4"):
            packed(x)
    with pytest.raises(ValueError, match="bias"):
        PackedLinear.pack(WEIGHT, torch.zeros(4))
    with pytest.raises(ValueError, match="float32"):
        PackedLinear.pack(WEIGHT.float(), None)


def test_only_bf16_is_packed_and_only_where_there_is_a_kernel() -> None:
    assert not supported(WEIGHT.float()) and not supported(WEIGHT.to("meta"))
    with without_c():
        assert not supported(WEIGHT)
