"""Grouped LoRA in two halves and in one launch: the same as the reference, however it is run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels.grouped_lora import expand, fused, halves, shrink, triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_factors

SLOTS = 5


def in_halves(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups, *, by: str) -> None:
    """By the public ops, with Triton's kernels or without; planes are full of NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(halves, "backend", lambda tensor: by)
            expand(y, shrink(x, a, groups), b, groups)
    finally:
        torch.use_deterministic_algorithms(False)


WAYS = [partial(in_halves, by="triton"), partial(in_halves, by="torch"), fused.grouped_lora, triton.grouped_lora]
WAY_IDS = ["halves, Triton", "halves, torch", "one launch", "as chosen"]


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    slots = draw(st.lists(st.integers(-1, SLOTS - 1), max_size=40))
    ranks = draw(st.lists(st.integers(0, 64), min_size=SLOTS, max_size=SLOTS))
    widths = draw(st.tuples(st.integers(1, 600), st.integers(1, 600)))
    return slots, ranks, widths, draw(st.sampled_from(list(TOLERANCES))), draw(st.integers(0, 5))


def build(case: tuple) -> tuple[Tensor, Tensor, tuple[SlotRows, SlotRows], RowGroups]:
    """Rows amid NaN; groups filled up as those of captured steps are, unless by 0."""
    slots, ranks, (width_in, width_out), dtype, filling = case
    buffers = [torch.full((len(slots), width + 5), float("nan"), dtype=dtype) for width in (width_out, width_in)]
    for seed, buffer in enumerate(buffers):
        values = torch.randn(len(slots), buffer.shape[1] - 5, generator=torch.Generator().manual_seed(seed))
        buffer[:, 2:-3] = values.to(dtype)
        buffer[:, 2] = -0.0
    groups = RowGroups.build(slots, "cpu", block_rows=16 if filling % 2 else 32)
    groups = replace(
        groups,
        order=torch.nn.functional.pad(groups.order, (0, filling), value=-1),
        tiles=torch.nn.functional.pad(groups.tiles, (0, 0, 0, filling)),
    )
    y, x = (buffer[:, 2:-3] for buffer in buffers)
    return y, x, random_factors(ranks, width_in, width_out, dtype), groups


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@given(case=cases())
@settings(deadline=None, max_examples=20)
def test_every_way_agrees_with_the_dense_formula(way: Callable[..., None], case: tuple) -> None:
    slots, ranks, _, dtype, _ = case
    y, x, (a, b), groups = build(case)
    before, expected = y.clone(), y.clone()
    for slot in set(slots) - {-1}:
        rows = [t for t, own in enumerate(slots) if own == slot]
        h = (x[rows].float() @ a.of(slot).float().T).to(dtype)
        expected[rows] = (expected[rows].float() + h.float() @ b.of(slot).float()).to(dtype)
    way(y, x, a, b, groups)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or ranks[slot] == 0]
    assert torch.equal(y[untouched].signbit(), before[untouched].signbit())
    assert torch.equal(y[untouched], before[untouched])
    assert y._base is not None and y._base[:, :2].isnan().all() and y._base[:, -3:].isnan().all()


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_the_same_on_every_run(way: Callable[..., None]) -> None:
    results = []
    for _ in range(2):
        y, x, weights, groups = build(([0, 1, -1, 0, 3], [16, 5, 0, 64, 0], (1500, 300), torch.bfloat16, 1))
        way(y, x, *weights, groups)
        results.append(y.float())
    assert torch.equal(*results)


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_what_allocates_is_outside_of_the_other_stream(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of another stream could be given to others while this one still reads it."""
    monkeypatch.setattr(halves, "backend", lambda tensor: by)
    made = torch.empty
    events = []

    @contextmanager
    def elsewhere():
        events.append("enter")
        yield
        events.append("leave")

    _, x, (a, _), groups = build(([0, 1, 0], [4, 8, 0, 0, 0], (40, 30), torch.float32, 0))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: events.append("allocate") or made(*args, **options))
    planes = shrink(x, a, groups, elsewhere())
    assert [event for event, _ in itertools.groupby(events)] == ["allocate", "enter", "leave"]
    expected = torch.stack([x[t] @ a.of(slot)[0] for t, slot in ((0, 0), (2, 0), (1, 1))])
    assert_close(planes.sum(0)[:, 0], expected)


def test_what_does_not_fit_is_refused() -> None:
    y, x, (a, b), groups = build(([0, 1], [4, 3, 0, 0, 0], (8, 6), torch.float32, 0))
    planes, beyond = shrink(x, a, groups), RowGroups.build([0, SLOTS], "cpu")
    with pytest.raises(ValueError, match="does not fit 2 rows of width 8"):
        shrink(y, a, groups)
    with pytest.raises(ValueError, match=r"float16 does not fit .* torch.float32"):
        shrink(x.half(), a, groups)
    with pytest.raises(ValueError, match="does not fit 2 rows of width 6"):
        expand(x, planes, b, groups)
    for wrong in (planes[:, :1], planes[:, :, :3], planes.half(), planes[0]):
        with pytest.raises(ValueError, match="do not fit 2 rows of ranks up to 4 in fp32"):
            expand(y, wrong, b, groups)
    for call in (lambda: shrink(x, a, beyond), lambda: expand(y, planes, b, beyond)):
        with pytest.raises(ValueError, match="slot 5, but the table has 5 slots"):
            call()
    many, few = build(([0, 1], [65, 3, 0, 0, 0], (8, 6), torch.float32, 0)), fused.MAX_RANK
    with pytest.raises(ValueError, match=f"rank 65 is more than {few}"):
        fused.grouped_lora(many[0], many[1], *many[2], many[3])


def test_one_launch_is_for_few_ranks_of_narrow_linears() -> None:
    """At 16 bits: where launches cost more than the factors' bytes, and no program reads much alone."""
    assert fused.one_launch_pays(1, 16, 4096, 2) and fused.one_launch_pays(4, 16, 1024, 2)
    assert not fused.one_launch_pays(8, 16, 4096, 2), "the factors of 128 ranks"
    assert not fused.one_launch_pays(1, 16, 14336, 2) and not fused.one_launch_pays(1, 64, 4096, 2)
    assert not fused.one_launch_pays(1, 16, 4096, 4)
    assert not fused.one_launch_pays(1, 2 * fused.MAX_RANK, 1, 2), "ranks that one launch does not serve"


@given(st.integers(1, 20_000), st.integers(1, 300), st.sampled_from([64, 128]))
def test_parts_cover_the_columns_and_fill_no_more_than_a_device(width: int, tiles: int, block: int) -> None:
    part = fused.part_width_of(width, tiles, block)
    parts = -(-width // part)
    assert part % block == 0 and (parts - 1) * part < width <= parts * part
    assert parts * tiles <= max(fused.PROGRAMS, tiles)
