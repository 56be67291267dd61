"""Low-rank updates that begin beside the base's product: the order of what is launched, and the same results.

There is no GPU here: in place of a second stream, an object notes when lines of work part and meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from weft.adapters import linear_site
from weft.adapters.base import Base, Site
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.layout import Layout
from weft.adapters.linear_site import LinearSite
from weft.adapters.overlap import FEW_ROWS, SecondStream, overlap_for
from weft.adapters.parts import LowRank
from weft.adapters.site import ActiveRows
from weft.adapters.slots import SlotPool
from weft.kernels.groups import RowGroups

WIDTHS = (12, 20)


class Noted:
    """Stands in for a second stream."""

    def __init__(self, most: int = FEW_ROWS) -> None:
        self.events: list[str] = []
        self._most = most

    def pays(self, rows: int) -> bool:
        return rows <= self._most

    @contextmanager
    def fork(self) -> Iterator[None]:
        self.events.append("fork")
        yield
        self.events.append("launched")

    def join(self) -> None:
        self.events.append("join")


@pytest.fixture
def pool() -> SlotPool:
    """Slot 0: LoRA alone, 1: LoRA and a gain of the input, a shift, 2: a gain of the input."""
    torch.manual_seed(0)
    base = Base("test", 1, {"q": Site("q", "linear", *WIDTHS, False)}, ("q",), torch.float32, kv_heads=1, head_dim=4)
    pool = SlotPool(base, num_slots=3, memory=1 << 16, dtype=torch.float32, device=torch.device("cpu"))

    def low_rank(rank: int) -> LowRank:
        return LowRank(torch.randn(rank, WIDTHS[0]), torch.randn(WIDTHS[1], rank))

    gain = torch.randn(WIDTHS[0])
    forms = SiteForms(low_rank(4)), SiteForms(low_rank(3), gain_in=gain, shift=torch.randn(WIDTHS[1]))
    for form in (*forms, SiteForms(gain_in=gain)):
        adapter = CompiledAdapter("v", "LORA", {"q": form})
        placement = pool.reserve(Layout.of(adapter))
        assert placement is not None
        pool.upload(placement, adapter)
        pool.publish(placement)
    return pool


def run(pool: SlotPool, slots: list[int], noted: Noted | None, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The site's output for rows on these slots; the product and the second half are noted too."""
    torch.manual_seed(1)
    linear, x = nn.Linear(*WIDTHS), torch.randn(1, len(slots), WIDTHS[0])
    if noted is not None:
        linear.register_forward_pre_hook(lambda *_: noted.events.append("product"))
        expand = linear_site.expand
        monkeypatch.setattr(linear_site, "expand", lambda *args: noted.events.append("expand") or expand(*args))
    rows = ActiveRows(tokens=RowGroups.build(slots, "cpu"), overlap=noted)
    with torch.inference_mode():
        return LinearSite(linear, "q", pool, rows, output=False)(x)


@pytest.mark.parametrize("slots", [[0, -1, 0], [0, 1, 2, -1, 1], [1, 1]])
def test_the_update_begins_beside_the_product(
    slots: list[int], pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other forms of some rows change what the product is given."""
    noted = Noted()
    alone = run(pool, slots, None, monkeypatch)
    torch.testing.assert_close(run(pool, slots, noted, monkeypatch), alone, rtol=1e-5, atol=1e-5)
    assert noted.events == ["fork", "launched", "product", "join", "expand"]


@pytest.mark.parametrize(("slots", "most"), [([2, -1], 9), ([-1, -1], 9), ([0, 1, 0], 2)])
def test_nothing_parts_without_an_update_or_with_many_rows(
    slots: list[int], most: int, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(most)
    alone = run(pool, slots, None, monkeypatch)
    assert torch.equal(run(pool, slots, noted, monkeypatch), alone) and noted.events == ["product"]


def test_what_parted_meets_again_after_an_error(pool: SlotPool) -> None:
    """Or memory that the other line still writes would be given to others."""
    noted = Noted()
    rows = ActiveRows(tokens=RowGroups.build([0], "cpu"), overlap=noted)

    def fail(*_: Any) -> None:
        raise MemoryError

    linear = nn.Linear(*WIDTHS)
    linear.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError), torch.inference_mode():
        LinearSite(linear, "q", pool, rows, output=False)(torch.randn(1, 1, WIDTHS[0]))
    assert noted.events == ["fork", "launched", "join"]


class Stream:
    """Of CUDA, as far as it is asked here; several share one record of who waited for whom."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.device = torch.device("cuda", 0)
        self._name = name
        self._waits = waits

    def wait_stream(self, other: Stream) -> None:
        self._waits.append((self._name, other._name))


def test_a_second_stream_waits_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []
    second, stack = Stream("second", waits), [Stream("current", waits)]

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        stack.append(stream)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stack[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    overlap = overlap_for(torch.device("cuda"))
    assert isinstance(overlap, SecondStream)
    assert overlap.pays(FEW_ROWS) and not overlap.pays(FEW_ROWS + 1)
    fork = overlap.fork()
    assert not waits, "what comes before is known when the fork is entered"
    with fork:
        assert stack[-1] is second and waits == [("second", "current")]
    assert len(stack) == 1
    overlap.join()
    assert waits == [("second", "current"), ("current", "second")]


def test_there_is_none_on_a_cpu() -> None:
    assert overlap_for(torch.device("cpu")) is None
