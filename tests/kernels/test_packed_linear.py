import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.grouped_lora.reference import grouped_lora as reference_lora
from weft.kernels.groups import RowGroups
from weft.kernels.packed_linear import PackedLinear, reference, supported
from weft.kernels.testing import assert_close, random_factors, without_c

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
@given(
    rows=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 20)), max_size=40),
    ranks=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    widths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    biased=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_what_adapters_add_comes_in_the_same_call(
    rows: list[tuple[int, int]], ranks: list[int], widths: tuple[int, int], biased: bool
) -> None:
    slots = [slot for slot, count in rows for _ in range(count)]
    groups, factors = RowGroups.build(slots, "cpu"), random_factors(ranks, *widths, torch.bfloat16)
    x, weight = torch.randn(len(slots), widths[0]).bfloat16(), torch.randn(widths[1], widths[0]).bfloat16()
    bias = torch.randn(widths[1]).bfloat16() if biased else None
    linear = PackedLinear.pack(weight, bias)
    expected = linear(x)
    untouched = [row for row, slot in enumerate(slots) if slot < 0 or not ranks[slot]]
    y = linear(x, (*factors, groups))
    assert torch.equal(y[untouched].view(torch.int16), expected[untouched].view(torch.int16))
    reference_lora(expected, x, *factors, groups)
    assert_close(y, expected)


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
