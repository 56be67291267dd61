import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.expert_groups import device_groups, expert_groups
from weft.kernels.grouped_expert_lora import grouped_expert_lora, reference
from weft.kernels.grouped_lora import triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


def expert_rows(ranks: list[int], experts: int, width: int, dtype: torch.dtype, scale: float, seed: int) -> SlotRows:
    """Rows of every slot's experts: those of as many slots, and an entry without any."""
    rows = random_rows([rank for rank in ranks for _ in range(experts)] + [0], width, dtype, scale=scale, seed=seed)
    return SlotRows(rows.pool, rows.table, rows.counts, tuple(ranks), experts)


@pytest.mark.parametrize("where", ["host", "device"])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24),
    ranks=st.lists(st.sampled_from([0, 1, 5, 17]), min_size=SLOTS, max_size=SLOTS),
    experts=st.integers(1, 6),
    chosen=st.integers(1, 3),
    width_in=st.integers(1, 200),
    width_out=st.integers(1, 150),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(where, slots, ranks, experts, chosen, width_in, width_out, dtype, seed) -> None:
    tokens = RowGroups.build(slots, "cpu")
    count = len(slots) * chosen
    generator = torch.Generator().manual_seed(seed)
    token = torch.arange(count)[torch.randperm(count, generator=generator)] // chosen
    expert = torch.randint(experts, (count,), generator=generator)
    a = expert_rows(ranks, experts, width_in, dtype, width_in**-0.5, seed)
    b = expert_rows(ranks, experts, width_out, dtype, max([*ranks, 1]) ** -0.5, seed + 1)
    y = rows_of(width_out, count, dtype, strided=False, seed=1)
    x = rows_of(width_in, count, dtype, strided=False, seed=2)
    before, expected = y.clone(), y.clone()
    own = [slots[t] for t in token.tolist()]
    reference.grouped_expert_lora(expected, x, a, b, own, expert.tolist())
    if where == "host":
        groups = expert_groups(tokens, token, expert, experts=experts, num_slots=SLOTS)
        grouped_expert_lora(y, x, a, b, groups)
    elif tokens.active:
        groups = device_groups(tokens, token, expert, experts=experts, num_slots=SLOTS)
        triton.grouped_lora(y, x, a, b, groups)
    assert_close(y, expected)
    untouched = [row for row, slot in enumerate(own) if slot < 0 or not ranks[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


@given(
    slots=st.lists(st.integers(-1, 5), min_size=1, max_size=60).filter(lambda slots: max(slots) >= 0),
    experts=st.integers(1, 9),
    skew=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_the_device_builds_the_groups_of_the_host(slots, experts, skew, seed) -> None:
    tokens = RowGroups.build(slots, "cpu")
    token = torch.arange(len(slots)).repeat_interleave(2)
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(min(skew, experts), (len(token),), generator=generator)
    given_ = {"experts": experts, "num_slots": 6}
    host, device = expert_groups(tokens, token, expert, **given_), device_groups(tokens, token, expert, **given_)
    assert device.order.tolist() == host.order.tolist() and device.slots.tolist() == host.slots.tolist()
    used = [tile for tile in device.tiles.tolist() if tile[2]]
    assert used == host.tiles.tolist()
    assert all(tile == [6 * experts, 0, 0] for tile in device.tiles.tolist()[len(used) :])


def test_what_does_not_fit_is_refused() -> None:
    groups = expert_groups(
        RowGroups.build([0, 0], "cpu"), torch.tensor([0, 1]), torch.tensor([0, 1]), experts=2, num_slots=1
    )
    a, b = (expert_rows([3], 2, width, torch.float32, 1.0, 0) for width in (3, 4))
    y, x = torch.zeros(2, 4), torch.zeros(2, 3)
    for wrong in ((y[:1], x), (y, x[:1]), (y, y), (torch.zeros(2, 5), x)):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_expert_lora(*wrong, a, b, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        grouped_expert_lora(y.half(), x, a, b, groups)
    with pytest.raises(ValueError, match="experts"):
        grouped_expert_lora(y, x, random_rows([3], 3, torch.float32), random_rows([3], 4, torch.float32), groups)
