import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.gated_lora import gated_lora, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


def random_updates(
    counts: list[int], rank: int, shared: list[bool], width_in: int, width_out: int, dtype: torch.dtype
) -> tuple[SlotRows, SlotRows, SlotRows]:
    """a, b and the gates, which are only counted here."""
    ups = [n * rank for n in counts]
    downs = [rank if n and one else up for n, one, up in zip(counts, shared, ups, strict=True)]
    a = random_rows(downs, width_in, dtype, scale=width_in**-0.5, seed=3)
    b = random_rows(ups, width_out, dtype, scale=max([*ups, 1]) ** -0.5, seed=4)
    return a, b, random_rows([n + 1 if n else 0 for n in counts], width_in, dtype, seed=5)


def random_gates(rows: int, most: int) -> torch.Tensor:
    return torch.rand(rows, most, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("implementation", [gated_lora, triton.gated_lora])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    counts=st.lists(st.sampled_from([0, 1, 3, 20]), min_size=SLOTS, max_size=SLOTS),
    shared=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
    rank=st.sampled_from([1, 4, 10]),
    width_in=st.integers(20, 600),
    width_out=st.integers(1, 150),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(
    implementation, slots, counts, shared, rank, width_in, width_out, dtype, strided
) -> None:
    counts[0] = counts[0] or 2
    y = rows_of(width_out, len(slots), dtype, strided=strided, seed=1)
    x = rows_of(width_in, len(slots), dtype, strided=strided, seed=2)
    updates, gates = (
        random_updates(counts, rank, shared, width_in, width_out, dtype),
        random_gates(len(slots), max(counts)),
    )
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    before, expected = y.clone(), y.clone()
    reference.gated_lora(expected, x, *updates, gates, groups)
    implementation(y, x, *updates, gates, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not counts[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_is_the_formula(shared: bool) -> None:
    slots, (a, b, gate) = [1, -1, 0, 1], random_updates([2, 5], 3, [shared, shared], 12, 7, torch.float32)
    y, x = (rows_of(width, 4, torch.float32, strided=False, seed=width) for width in (7, 12))
    gates, expected = random_gates(4, 5), y.double()
    for t, slot in enumerate(slots):
        for e in range([2, 5][slot] if slot >= 0 else 0):
            at = slice(3 * e, 3 * e + 3)
            down = a.of(slot) if shared else a.of(slot)[at]
            expected[t] += float(gates[t, e]) * (down.double() @ x[t].double()) @ b.of(slot)[at].double()
    reference.gated_lora(y, x, a, b, gate, gates, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


def test_what_does_not_fit_is_refused() -> None:
    groups, (a, b, gate) = RowGroups.build([0, 0], "cpu"), random_updates([2], 2, [False], 3, 4, torch.float32)
    y, x, gates = torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2, 2)
    for wrong in (
        (y[:1], x, gates),
        (y, x[:1], gates),
        (y, y, gates),
        (torch.zeros(2, 5), x, gates),
        (y, x, gates[:1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            gated_lora(*wrong[:2], a, b, gate, wrong[2], groups)
    for rows in ([3], [1]):
        with pytest.raises(ValueError, match="cannot share"):
            gated_lora(y, x, random_rows(rows, 3, torch.float32), b, gate, gates, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        gated_lora(y.half(), x, a, b, gate, gates, groups)
