import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels.grouped_lora import grouped_lora, grouped_lora_packed, pack, packed, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_factors, without_c

DTYPES = st.sampled_from(list(TOLERANCES))
SLOTS = 5


def by_torch(*args) -> None:
    """The CPU path where there is no C compiler."""
    with without_c():
        grouped_lora(*args)


def rows_of(width: int, count: int, dtype: torch.dtype, *, strided: bool, seed: int) -> Tensor:
    """[count, width] of unit scale with a negative zero in front; if strided, a view of a buffer full of NaN."""
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values[:, 0] = -0.0
    if not strided:
        return values
    buffer = torch.full((count, width + 5), float("nan"), dtype=dtype)
    buffer[:, 2 : 2 + width] = values
    return buffer[:, 2 : 2 + width]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check(y: Tensor, before: Tensor, expected: Tensor, slots: list[int], ranks: list[int]) -> None:
    """y agrees with what is expected, and rows without an update have not changed in a bit."""
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or ranks[slot] == 0]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))
    if y._base is not None:
        assert y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


@st.composite
def cases(draw: st.DrawFn, max_rows: int, max_width: int, max_rank: int) -> tuple:
    slots = draw(st.lists(st.integers(-1, SLOTS - 1), max_size=max_rows))
    ranks = draw(st.lists(st.integers(0, max_rank), min_size=SLOTS, max_size=SLOTS))
    widths = draw(st.tuples(st.integers(1, max_width), st.integers(1, max_width)))
    return slots, ranks, widths, draw(DTYPES), draw(st.booleans())


def build(case: tuple) -> tuple[Tensor, Tensor, tuple[SlotRows, SlotRows], RowGroups]:
    slots, ranks, (width_in, width_out), dtype, strided = case
    y = rows_of(width_out, len(slots), dtype, strided=strided, seed=1)
    x = rows_of(width_in, len(slots), dtype, strided=strided, seed=2)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    return y, x, random_factors(ranks, width_in, width_out, dtype), groups


@given(cases(max_rows=40, max_width=600, max_rank=90))
@settings(deadline=None, max_examples=40)
def test_triton_agrees_with_the_reference(case: tuple) -> None:
    y, x, weights, groups = build(case)
    before, expected = y.clone(), y.clone()
    reference.grouped_lora(expected, x, *weights, groups)
    triton.grouped_lora(y, x, *weights, groups)
    check(y, before, expected, case[0], case[1])


def test_triton_at_the_largest_rank() -> None:
    y, x, weights, groups = build(([0, 1, -1, 0], [256, 1, 0, 0, 0], (130, 70), torch.float32, False))
    expected = y.clone()
    reference.grouped_lora(expected, x, *weights, groups)
    triton.grouped_lora(y, x, *weights, groups)
    assert_close(y, expected)


@pytest.mark.parametrize("implementation", [grouped_lora, by_torch])
@given(case=cases(max_rows=80, max_width=900, max_rank=256))
@settings(deadline=None)
def test_the_cpu_agrees_with_the_reference(implementation, case: tuple) -> None:
    y, x, weights, groups = build(case)
    before, expected = y.clone(), y.clone()
    reference.grouped_lora(expected, x, *weights, groups)
    implementation(y, x, *weights, groups)
    check(y, before, expected, case[0], case[1])


@pytest.mark.parametrize("implementation", [grouped_lora, by_torch])
@given(
    slots=st.permutations([*[0] * 200, *[1] * 70, *[2] * 33, *[3] * 16, 4, -1, -1]),
    in_order=st.booleans(),
    ranks=st.permutations([16, 0, 8, 40, 90]),
    widths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    dtype=DTYPES,
)
@settings(deadline=None, max_examples=30)
def test_the_cpu_agrees_on_long_segments(implementation, slots, in_order, ranks, widths, dtype) -> None:
    slots = sorted(slots) if in_order else slots
    # Of rows of an odd width torch's products in bf16 read one element more, times 0: NaN around them would come in.
    y, x, weights, groups = build((slots, ranks, widths, dtype, implementation is grouped_lora))
    before, expected = y.clone(), y.clone()
    reference.grouped_lora(expected, x, *weights, groups)
    implementation(y, x, *weights, groups)
    check(y, before, expected, slots, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_in_its_row(dtype: torch.dtype) -> None:
    slots = [0] * 100 + [1] * 3
    y, x, weights, groups = build((slots, [3, 5, 0, 0, 0], (40, 50), dtype, False))
    expected = y.clone()
    grouped_lora(expected, x, *weights, groups)
    x[7, 3], x[8, 3], x[101, 0] = float("nan"), float("inf"), float("nan")
    grouped_lora(y, x, *weights, groups)
    assert y[7].isnan().all() and y[101].isnan().all() and y[8].isinf().any()
    others = [t for t in range(len(slots)) if t not in (7, 8, 101)]
    assert torch.equal(y[others], expected[others])


@given(cases(max_rows=12, max_width=50, max_rank=20).filter(lambda case: case[3] == torch.float32))
@settings(deadline=None, max_examples=25)
def test_the_reference_is_the_dense_formula(case: tuple) -> None:
    slots, ranks = case[:2]
    y, x, weights, groups = build(case)
    expected = y.double()
    for t, slot in enumerate(slots):
        for j in range(ranks[slot] if slot >= 0 else 0):
            a, b = (rows.pool[rows.table[slot, j]].double() for rows in weights)
            expected[t] += b * (a @ x[t].double())
    reference.grouped_lora(y, x, *weights, groups)
    assert_close(y, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_inner_vector_is_rounded_as_peft_rounds_it(dtype: torch.dtype) -> None:
    weights, groups = random_factors([16], 512, 64, dtype), RowGroups.build([0] * 64, "cpu")
    x, y = rows_of(512, 64, dtype, strided=False, seed=3), torch.zeros(64, 64, dtype=dtype)
    both = pack(*weights, groups.active)
    peft = torch.nn.functional.linear(torch.nn.functional.linear(x, both.a), both.b.T)
    reference.grouped_lora(y, x, *weights, groups)
    assert (y == peft).float().mean() > 0.99  # the rest: sums in another order, at the edge of a rounding


def test_another_adapters_overflow_does_not_leak() -> None:
    slots = [0, 1, 2, 1, 0, -1]
    y, x, weights, groups = build((slots, [4, 4, 4, 0, 0], (20, 12), torch.float32, False))
    alone = y.clone()
    grouped_lora(alone, x, *weights, groups)
    for rows in weights:
        rows.pool[rows.table[1, 0]] = float("inf")
        for implementation in (reference.grouped_lora, grouped_lora, by_torch, triton.grouped_lora):
            mixed = y.clone()
            with np.errstate(invalid="ignore"):  # the interpreter is numpy, and inf - inf is what slot 1 asks for
                implementation(mixed, x, *weights, groups)
            others = [t for t, slot in enumerate(slots) if slot != 1]
            assert_close(mixed[others], alone[others])
            assert not mixed[[1, 3]].isfinite().any()


def test_weights_packed_for_more_slots_serve_fewer() -> None:
    y, x, weights, groups = build(([3, -1, 3, 1], [8, 4, 0, 6, 2], (30, 40), torch.float32, False))
    expected = y.clone()
    reference.grouped_lora(expected, x, *weights, groups)
    wide = pack(*weights, (0, 1, 2, 3, 4))
    assert wide.layout == ((0, 8), (1, 4), (3, 6), (4, 2))
    grouped_lora_packed(y, x, wide, groups)
    assert_close(y, expected)
    with pytest.raises(ValueError, match=r"slots \[3\], but the weights were packed for slots \(0, 1\)"):
        grouped_lora_packed(y, x, pack(*weights, (0, 1)), groups)


def test_sites_of_one_layout_share_their_blocks() -> None:
    groups = RowGroups.build([0, 1, 2, 0], "cpu")
    built = []
    for width in (20, 30):
        weights = random_factors([4, 8, 2], width, width, torch.float32)
        by_torch(torch.zeros(4, width), torch.zeros(4, width), *weights, groups)
        built.append(list(groups._plans.values()))
    assert len(built[0]) == len(built[1]) and all(a is b for a, b in zip(*built, strict=True))


def test_a_batch_on_the_base_is_left_alone() -> None:
    groups = RowGroups.build([-1, -1], "cpu")
    weights = random_factors([4], 8, 8, torch.float32)
    for implementation in (reference.grouped_lora, grouped_lora, by_torch, triton.grouped_lora):
        y = torch.full((2, 8), -0.0)
        implementation(y, torch.ones(2, 8), *weights, groups)
        assert torch.equal(bits(y), bits(torch.full((2, 8), -0.0)))


def test_what_does_not_fit_is_refused() -> None:
    weights, groups = random_factors([4, 4], 8, 6, torch.float32), RowGroups.build([0, 1], "cpu")
    y, x = torch.zeros(2, 6), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        grouped_lora(y, x[:1], *weights, groups)
    with pytest.raises(ValueError, match="do not fit"):
        grouped_lora(x, x, *weights, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_lora(y.half(), x, *weights, groups)
    with pytest.raises(ValueError, match="slot 2"):
        grouped_lora(y, x, *weights, RowGroups.build([0, 2], "cpu"))


def test_few_rows_share_their_products_and_many_do_not() -> None:
    weights = random_factors([4, 4], 8, 8, torch.float32)
    few = RowGroups.build([0, 1, 0, -1], "cpu")
    rows = packed.WORTH_A_PRODUCT[4] // 4 + 1
    many = RowGroups.build([1, *[0] * rows], "cpu")
    for groups, expected in ((few, [(slice(0, 3), True)]), (many, [(slice(1, rows + 1), False), (slice(0, 1), False)])):
        by_torch(torch.zeros(groups.num_rows, 8), torch.zeros(groups.num_rows, 8), *weights, groups)
        blocks = list(groups._plans.values())[-1]
        assert [(block.rows, block.foreign is not None) for block in blocks] == expected


def test_packing_a_slot_without_weights() -> None:
    y, x, weights, groups = build(([0, 0], [0, 4, 0, 0, 0], (6, 5), torch.float32, False))
    assert pack(*weights, groups.active).layout == ()
    before = y.clone()
    grouped_lora(y, x, *weights, groups)
    assert torch.equal(bits(y), bits(before))
