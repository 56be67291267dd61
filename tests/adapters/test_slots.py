"""Slots and their pages under any order of loads and unloads, and what the tables then say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft.adapters.base import Base, Site, Sublayer
from weft.adapters.bottlenecks import Bottleneck, Fusion
from weft.adapters.errors import AdapterTooLarge
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.layout import Layout, Placement
from weft.adapters.parts import GatedPrefix, LowRank, Part, RoutedLowRank, Sparse, Turn
from weft.adapters.side import SideNetwork, SideSizes
from weft.adapters.slots import SlotPool
from weft.kernels.activations import Activation
from weft.kernels.grouped_bottleneck import Input
from weft.kernels.sparse_rows import unpack_rows

WIDTHS = {"a.q": (12, 20), "a.k": (12, 8), "b.q": (12, 20), "b.o": (20, 12)}
BASE = Base(
    "test",
    2,
    {path: Site(path, "linear", w_in, w_out, False) for path, (w_in, w_out) in WIDTHS.items()},
    tuple(WIDTHS),
    torch.float32,
    kv_heads=2,
    head_dim=4,
    sublayers={"a": Sublayer("a", "a.norm", 0, True)},
    hidden_size=12,
)
RANK_BYTES = sum(sum(widths) for widths in WIDTHS.values()) * 4


VECTORS = {Part.GAIN_IN: 0, Part.GAIN_OUT: 1, Part.SHIFT: 1}
"""Parts of one row, and which of a site's widths they have."""


def make_adapter(ranks: dict[str, int], vectors: frozenset[tuple[str, Part]] = frozenset()) -> CompiledAdapter:
    """Random tensors of these ranks and parts at these sites."""
    sites = {}
    for path in ranks.keys() | {path for path, _ in vectors}:
        widths, rank = WIDTHS[path], ranks.get(path, 0)
        low_rank = LowRank(torch.randn(rank, widths[0]), torch.randn(widths[1], rank)) if rank else None
        rows = {part: torch.randn(widths[VECTORS[part]]) for where, part in vectors if where == path}
        delta = torch.randn(widths[1], widths[0]) if rank > 20 else None
        rotation = torch.randn(4, widths[0]) if rank > 25 else None
        turn = Turn(torch.randn(2, widths[1]), widths[1] // (2 + rank % 2 * 2)) if 5 < rank < 15 else None
        ends = torch.arange(widths[1] + 1, dtype=torch.int32)
        columns = torch.arange(widths[1], dtype=torch.int32) % widths[0]
        sparse = Sparse(ends, columns, torch.randn(widths[1]), widths[0]) if rank in (22, 7, 29) else None
        prefix = GatedPrefix(torch.randn(rank, 8), torch.randn(rank, 8), rank % 2 == 0) if 6 <= rank <= 10 else None
        routed = None
        if low_rank is not None and 11 <= rank <= 17:
            routed = RoutedLowRank(low_rank.a, low_rank.b, torch.randn(rank // 5, widths[0]), rank // 5)
        more = {"rotate_in": rotation, "turn": turn, "sparse": sparse, "prefix": prefix, "routed": routed}
        sites[path] = SiteForms(low_rank, delta=delta, **more, **rows)
    return CompiledAdapter("v", "LORA", sites)


def make_bottleneck(units: int) -> Bottleneck:
    """Random tensors, of a kind that depends on the width."""
    kind = (list(Activation)[units % len(Activation)], list(Input)[units % len(Input)])
    return Bottleneck(torch.randn(units, 12), torch.randn(units), torch.randn(12, units), torch.randn(12), *kind)


def make_sublayer(units: int, fused: bool) -> CompiledAdapter:
    """A bottleneck, or a fusion of two."""
    if not fused:
        return CompiledAdapter("v", "Bn", {"a": SiteForms(bottleneck=make_bottleneck(units))})
    first, second = (make_bottleneck(count) for count in (units, units + len(Activation) * len(Input)))
    square = torch.randn(12, 12), torch.randn(12), torch.randn(12, 12), torch.randn(12)
    fusion = Fusion((first, second), *square, torch.randn(12, 12) if units % 2 else None)
    return CompiledAdapter("v", "Fusion", {"a": SiteForms(fusion=fusion)})


def make_network(layers: int) -> CompiledAdapter:
    """A side network of weights that do not fill their rows."""
    shapes = {
        f"{layer}.{name}": shape for layer in range(layers) for name, shape in (("w", (5, layer + 1)), ("b", (12,)))
    }
    weights = tuple(torch.randn(shape) for shape in shapes.values())
    network = SideNetwork(SideSizes(layers), tuple(shapes), weights, 12)
    return CompiledAdapter("v", "Network", {"a": SiteForms(network=network)})


def make_pool(num_slots: int = 3, ranks: int = 32) -> SlotPool:
    cpu = torch.device("cpu")
    return SlotPool(BASE, num_slots=num_slots, memory=ranks * RANK_BYTES, dtype=torch.float32, device=cpu)


class SlotPoolMachine(RuleBasedStateMachine):
    """Adapters of ragged ranks come and go; every published one reads back as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.placed: list[tuple[Placement, CompiledAdapter]] = []

    @rule(
        ranks=st.dictionaries(st.sampled_from(sorted(WIDTHS)), st.integers(1, 30), max_size=4),
        vectors=st.frozensets(st.tuples(st.sampled_from(sorted(WIDTHS)), st.sampled_from(sorted(VECTORS))), max_size=5),
    )
    def load(self, ranks: dict[str, int], vectors: frozenset[tuple[str, Part]]) -> None:
        self.place(make_adapter(ranks, vectors))

    @rule(units=st.integers(1, 30), fused=st.booleans())
    def load_sublayer(self, units: int, fused: bool) -> None:
        self.place(make_sublayer(units, fused))

    @rule(layers=st.integers(1, 30))
    def load_network(self, layers: int) -> None:
        self.place(make_network(layers))

    def place(self, adapter: CompiledAdapter) -> None:
        placement = self.pool.reserve(Layout.of(adapter))
        if placement is not None:
            self.pool.upload(placement, adapter)
            self.pool.publish(placement)
            self.placed.append((placement, adapter))

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        placement, _ = self.placed.pop(data.draw(st.integers(0, len(self.placed) - 1)))
        self.pool.free(placement)

    @invariant()
    def tables_say_what_was_loaded(self) -> None:
        self.pool.check_integrity()
        here = {placement.slot: adapter for placement, adapter in self.placed}
        self.kinds_say_what_was_loaded(here)
        for path, part in ((path, part) for path in (*WIDTHS, "a") for part in Part if part is not Part.NETWORK):
            rows = self.pool.rows(path, part)
            for slot in range(self.pool.num_slots):
                forms = here[slot].sites.get(path, SiteForms()) if slot in here else SiteForms()
                expected = forms.parts().get(part)
                count = 0 if expected is None else len(expected)
                assert count == (0 if rows is None else rows.host_counts[slot])
                if rows is not None and expected is not None:
                    assert count == rows.counts[slot] and rows.of(slot).view(torch.int32).equal(
                        expected.view(torch.int32)
                    )
            assert rows is None or any(rows.host_counts), "a table nobody needs"
            assert (rows is not None) == (part in self.pool.parts(path))
        for slot, adapter in here.items():
            for path, forms in adapter.sites.items():
                for part, number in forms.numbers().items():
                    assert self.pool.numbers(path, part)[slot] == number

    def kinds_say_what_was_loaded(self, here: dict[int, CompiledAdapter]) -> None:
        forms = {slot: adapter.sites.get("a", SiteForms()) for slot, adapter in here.items()}
        bottlenecks = self.pool.bottlenecks("a")
        for slot in range(self.pool.num_slots):
            own = forms[slot].bottleneck if slot in forms else None
            kind = None if bottlenecks is None else bottlenecks.host_kinds[slot]
            assert kind == (None if own is None else (own.input, own.activation))
            if own is not None and bottlenecks is not None:
                assert (bottlenecks.inputs[slot], bottlenecks.activations[slot]) == kind
                assert bottlenecks.up.of(slot).equal(own.up.T)
        assert bottlenecks is None or any(bottlenecks.host_kinds), "kinds nobody needs"
        fusions = dict(self.pool.fusions("a", tuple(here)))
        assert fusions.keys() == {slot for slot, form in forms.items() if form.fusion}
        for slot, fusion in fusions.items():
            loaded = forms[slot].fusion
            assert loaded is not None and fusion.shape == loaded.shape and fusion.rows().equal(loaded.rows())
            assert all(
                one.down_bias.equal(other.down_bias) and one.up.equal(other.up)
                for one, other in zip(fusion.members, loaded.members, strict=True)
            )
        networks = {slot: (shape, rows) for slot, shape, rows in self.pool.networks(tuple(here))}
        assert networks.keys() == {slot for slot, form in forms.items() if form.network}
        for slot, (shape, rows) in networks.items():
            network = forms[slot].network
            assert network is not None and shape == network.shape
            weights = shape.weights(rows)
            assert list(weights) == list(network.names)
            assert all(one.equal(other) for one, other in zip(weights.values(), network.weights, strict=True))


SlotPoolMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestSlotPool = SlotPoolMachine.TestCase


def test_a_small_rank_beside_a_large_one_costs_its_own_rows() -> None:
    pool = make_pool(ranks=320)
    small = pool.reserve(Layout.of(make_adapter({"a.q": 3})))
    used = pool.nbytes_used
    pool.reserve(Layout.of(make_adapter({"a.q": 18})))
    assert small is not None
    assert used == (12 + 20) * 3 * 4
    assert pool.nbytes_used == 7 * used


def test_sites_an_adapter_does_not_touch_cost_nothing() -> None:
    pool = make_pool()
    pool.reserve(Layout.of(make_adapter({"a.k": 5})))
    assert pool.nbytes_used == (12 + 8) * 5 * 4


def test_no_room_is_none_and_takes_nothing() -> None:
    pool = make_pool(num_slots=1)
    first = pool.reserve(Layout.of(make_adapter({"a.q": 1})))
    used = pool.nbytes_used
    assert first is not None
    assert pool.reserve(Layout.of(make_adapter({"b.o": 1}))) is None
    assert pool.nbytes_used == used
    pool.free(first)
    pool.check_integrity()
    assert pool.nbytes_used == 0


def test_an_adapter_that_never_fits_is_refused_by_the_setting_to_raise() -> None:
    pool = make_pool(ranks=1)
    with pytest.raises(AdapterTooLarge, match="adapter-memory"):
        pool.check_fits(Layout.of(make_adapter({"a.k": 800})))


def test_memory_below_one_rank_per_site_is_an_error() -> None:
    with pytest.raises(ValueError, match="below the least useful"):
        SlotPool(BASE, num_slots=1, memory=100, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_integers_among_the_rows_keep_every_bit(dtype: torch.dtype) -> None:
    """Some columns are signalling NaNs in 16 bits."""
    columns = torch.tensor([0, 1, 0x7C01, 0x7F81, 0x7FC1, 0xFF81], dtype=torch.int32)
    base = replace(BASE, sites={"a": Site("a", "linear", 1 << 16, 2, False)}, sublayers={})
    pool = SlotPool(base, num_slots=1, memory=1 << 22, dtype=dtype, device=torch.device("cpu"))
    values = torch.randn(6).to(dtype)
    update = Sparse(torch.tensor([0, 2, 6], dtype=torch.int32), columns, values, 1 << 16)
    adapter = CompiledAdapter("v", "SHIRA", {"a": SiteForms(sparse=update)})
    placement = pool.reserve(Layout.of(adapter))
    assert placement is not None
    pool.upload(placement, adapter)
    pool.publish(placement)
    rows = pool.rows("a", Part.SPARSE)
    assert rows is not None
    for found, put in zip(unpack_rows(rows.of(0), 2), (update.starts, columns, values), strict=True):
        assert found.equal(put)


def test_generations_tell_two_contents_of_one_slot_apart() -> None:
    pool = make_pool(num_slots=1)
    seen = set()
    for _ in range(3):
        adapter = make_adapter({"a.q": 2})
        placement = pool.reserve(Layout.of(adapter))
        assert placement is not None
        pool.publish(placement)
        seen.add(pool.generations[placement.slot])
        pool.free(placement)
    assert len(seen) == 3
