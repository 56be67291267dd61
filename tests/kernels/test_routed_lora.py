import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.groups import RowGroups
from weft.kernels.routed_lora import MAX_EXPERTS, reference, routed_lora, triton
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_factors, random_rows

SLOTS = 4


def random_experts(
    experts: list[int], rank: int, width_in: int, width_out: int, dtype: torch.dtype
) -> tuple[SlotRows, SlotRows, SlotRows]:
    """a, b and prototypes. A prototype is 1 at one column and 0 elsewhere: which experts are chosen does not depend on
    rounding."""
    a, b = random_factors([n * rank for n in experts], width_in, width_out, dtype)
    prototypes = random_rows(experts, width_in, dtype, seed=5)
    used = torch.cat([prototypes.table[slot, :n] for slot, n in enumerate(experts)]).long()
    columns = torch.arange(len(used)) % width_in
    prototypes.pool[used] = torch.nn.functional.one_hot(columns, width_in).to(dtype)
    return a, b, prototypes


@pytest.mark.parametrize("implementation", [routed_lora, triton.routed_lora])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    experts=st.lists(st.sampled_from([0, 1, 3, 20]), min_size=SLOTS, max_size=SLOTS),
    most=st.integers(1, 5),
    rank=st.sampled_from([1, 4, 10]),
    width_in=st.integers(80, 600),
    width_out=st.integers(1, 150),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(
    implementation, slots, experts, most, rank, width_in, width_out, dtype, strided
) -> None:
    y = rows_of(width_out, len(slots), dtype, strided=strided, seed=1)
    x = rows_of(width_in, len(slots), dtype, strided=strided, seed=2)
    x[:, 0] = 0.5
    weights = random_experts(experts, rank, width_in, width_out, dtype)
    top_k = torch.tensor([min(most, n) for n in experts], dtype=torch.int32)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    before, expected = y.clone(), y.clone()
    reference.routed_lora(expected, x, *weights, top_k, groups)
    implementation(y, x, *weights, top_k, groups)
    if dtype == torch.float32:
        assert_close(y, expected)
    else:  # equal likenesses, which 16 bits have, may be broken either way
        likeness = x.float().abs().sort(dim=1).values
        clear = torch.tensor([len(set(row.tolist())) == len(row) for row in likeness], dtype=torch.bool)
        assert_close(y[clear], expected[clear])
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not experts[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


def test_the_reference_is_the_formula() -> None:
    slots, (a, b, prototypes) = [1, -1, 0, 1], random_experts([2, 5], 3, 12, 7, torch.float32)
    y = rows_of(7, 4, torch.float32, strided=False, seed=1)
    x = rows_of(12, 4, torch.float32, strided=False, seed=2)
    expected, top_k = y.double(), torch.tensor([1, 3], dtype=torch.int32)
    for t, slot in enumerate(slots):
        if slot < 0:
            continue
        likeness = [float((p.double() @ x[t].double()).abs()) for p in prototypes.of(slot)]
        chosen = sorted(range(len(likeness)), key=lambda e: -likeness[e])[: int(top_k[slot])]
        weights = torch.tensor([likeness[e] for e in chosen], dtype=torch.float64).softmax(0)
        for weight, expert in zip(weights, chosen, strict=True):
            at = slice(3 * expert, 3 * expert + 3)
            expected[t] += weight * (a.of(slot)[at].double() @ x[t].double()) @ b.of(slot)[at].double()
    reference.routed_lora(y, x, a, b, prototypes, top_k, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


@pytest.mark.parametrize("implementation", [routed_lora, triton.routed_lora])
def test_large_likenesses_do_not_overflow(implementation) -> None:
    weights = random_experts([MAX_EXPERTS], 2, 64, 8, torch.float32)
    x = torch.arange(1.0, 65.0).repeat(3, 1) * 1e3
    y, groups = torch.zeros(3, 8), RowGroups.build([0, 0, 0], "cpu")
    implementation(y, x, *weights, torch.tensor([MAX_EXPERTS], dtype=torch.int32), groups)
    assert bool(y.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    groups, (a, b, prototypes) = RowGroups.build([0, 0], "cpu"), random_experts([2], 2, 3, 4, torch.float32)
    y, x, top_k = torch.zeros(2, 4), torch.zeros(2, 3), torch.tensor([1], dtype=torch.int32)
    for wrong in ((y[:1], x), (y, x[:1]), (y, y), (torch.zeros(2, 5), x)):
        with pytest.raises(ValueError, match="do not fit"):
            routed_lora(*wrong, a, b, prototypes, top_k, groups)
    for experts in (3, 0, MAX_EXPERTS + 1):
        with pytest.raises(ValueError, match="cannot share"):
            routed_lora(y, x, a, b, random_rows([experts], 3, torch.float32), top_k, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        routed_lora(y.half(), x, a, b, prototypes, top_k, groups)
