import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.groups import RowGroups
from weft.kernels.testing import sample_slots


@given(st.lists(st.integers(-1, 6), max_size=120), st.sampled_from([16, 32]))
@settings(deadline=None)
def test_every_adapted_row_is_in_one_tile_of_its_slot(slots: list[int], block_rows: int) -> None:
    groups = RowGroups.build(slots, "cpu", block_rows=block_rows)
    order, tiles = groups.order.tolist(), groups.tiles.tolist()
    assert groups.slots.tolist() == slots and groups.num_rows == len(slots)
    assert order == sorted((t for t, slot in enumerate(slots) if slot >= 0), key=lambda t: slots[t])
    assert groups.active == tuple(sorted({slot for slot in slots if slot >= 0}))
    assert [slot for slot, _, _ in groups.segments] == list(groups.active)
    covered = [(start + i, slot) for slot, start, length in tiles for i in range(length)]
    assert covered == [(i, slots[row]) for i, row in enumerate(order)]
    assert all(1 <= length <= block_rows for _, _, length in tiles)
    assert len(tiles) == sum(-(-slots.count(slot) // block_rows) for slot in groups.active) == groups.num_tiles
    assert [i for _, start, stop in groups.segments for i in range(start, stop)] == list(range(groups.num_adapted))


def test_a_batch_on_the_base_has_no_groups() -> None:
    for slots in ([], [-1, -1]):
        groups = RowGroups.build(slots, "cpu")
        assert groups.active == () and groups.num_tiles == groups.num_adapted == 0


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ValueError, match="-2"):
        RowGroups.build([0, -2], "cpu")
    for block_rows in (8, 24, 64):
        with pytest.raises(ValueError, match=f"block_rows is {block_rows}"):
            RowGroups.build([0], "cpu", block_rows=block_rows)


def test_a_plan_is_built_once_a_step() -> None:
    groups, built = RowGroups.build([0], "cpu"), []
    for key in ("a", "a", "b"):
        assert groups.plan(key, lambda key=key: built.append(key) or key) == key
    assert built == ["a", "b"]


def test_samplers_have_the_popularity_they_name() -> None:
    rng = np.random.default_rng(0)
    assert sample_slots("distinct", 32, rng) == list(range(32))
    assert set(sample_slots("identical", 32, rng)) == {0}
    assert set(sample_slots("uniform", 1024, rng)) == set(range(32))
    counts = np.bincount(sample_slots("skewed", 4096, rng))
    assert 1.3 < counts[0] / counts[1] < 1.7 and 1.3 < counts[1] / counts[2] < 1.7
