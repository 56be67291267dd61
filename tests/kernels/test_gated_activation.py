import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.activations import Activation
from weft.kernels.gated_activation import gated_activation, reference, triton
from weft.kernels.testing import TOLERANCES, assert_close

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [gated_activation, triton.gated_activation])


@IMPLEMENTATIONS
@given(
    rows=st.sampled_from([1, 3, 40]),
    width=st.sampled_from([1, 16, 20, 80, 96, 2100]),
    activation=st.sampled_from(list(Activation)),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@settings(deadline=None, max_examples=60)
def test_it_agrees_with_the_reference(implementation, rows, width, activation, size, dtype) -> None:
    gate = rows_of(width, rows, dtype, strided=False, seed=1) * size
    up = rows_of(width, rows, dtype, strided=False, seed=2)
    y = implementation(gate, up, activation)
    assert y.dtype == dtype and y.shape == gate.shape and y.is_contiguous()
    assert_close(y, reference.gated_activation(gate, up, activation))


@IMPLEMENTATIONS
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU, Activation.GELU_TANH])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_large_values_neither_overflow_nor_leak(implementation, activation, dtype) -> None:
    gate = torch.tensor([-6e4, -1e3, -100.0, -88.0, 0.0, 88.0, 100.0, 1e3, 6e4, float("nan"), 1.0]).to(dtype)
    y = implementation(gate, torch.ones_like(gate), activation)
    assert_close(y[:9], gate[:9].clamp(min=0))
    assert y[9].isnan() and 0.7 < y[10] < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows(dtype) -> None:
    gate, up = torch.randn(7, 40).to(dtype).chunk(2, -1)
    for one, other in ((gate, up), (gate, up.contiguous()), (gate.T, up.T), (gate[:0], up[:0]), (gate[0], up[0])):
        y = gated_activation(one, other, Activation.SILU)
        assert_close(y, reference.gated_activation(one, other, Activation.SILU))


def test_an_element_does_not_depend_on_the_others() -> None:
    """Bit for bit, and so no row on the rest of its batch."""
    gate, up = torch.randn(300, 96).bfloat16(), torch.randn(300, 96).bfloat16()
    for activation in (Activation.SILU, Activation.GELU, Activation.GELU_TANH):
        among = gated_activation(gate, up, activation)
        for row in (0, 150, 299):
            assert torch.equal(bits(gated_activation(gate[row], up[row], activation)), bits(among[row]))


def test_what_does_not_fit_is_refused() -> None:
    for up in (torch.zeros(6), torch.zeros(2, 6, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"gate \(2, 6\) torch\.float32 does not fit up"):
            gated_activation(torch.zeros(2, 6), up, Activation.SILU)
