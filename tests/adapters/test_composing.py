"""Weighed sums of adapters as rows of a pool, against the dense formula; and what cannot be composed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.adapters.base import Base, Site
from weft.adapters.choices import Choice
from weft.adapters.composing import ADDITIVE, Recipe
from weft.adapters.composition import Combination, Composition, Member
from weft.adapters.errors import NotComposable
from weft.adapters.forms import CompiledAdapter, SiteForms, SoftPrompt
from weft.adapters.layout import Layout, Placement
from weft.adapters.parts import LowRank, Part, Sparse, Turn
from weft.adapters.slots import SlotPool
from weft.adapters.weighting import weigh
from weft.kernels.sparse_rows import unpack_rows

WIDTHS = {"q": (12, 20), "o": (20, 12), "e": (12, 8)}
EXPERTS = 3
BASE = Base(
    "test",
    1,
    {path: Site(path, "linear", *widths, True) for path, widths in WIDTHS.items() if path != "e"},
    ("q", "o"),
    torch.float32,
    parameter_sites={"e": Site("e", "experts", *WIDTHS["e"], False, experts=EXPERTS)},
    hidden_size=12,
)
WEIGHTS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(-3, 3, width=32))


def make_pool(dtype: torch.dtype = torch.float32) -> SlotPool:
    return SlotPool(BASE, num_slots=32, memory=1 << 22, dtype=dtype, device=torch.device("cpu"))


def random_member(version: str, forms: dict[str, tuple[int, bool, bool, bool]], dtype: torch.dtype) -> CompiledAdapter:
    """Of each site its rank, and whether there are a dense and a sparse update and a shift."""
    sites = {}
    for path, (rank, dense, sparse, shifted) in forms.items():
        width_in, width_out = WIDTHS[path]
        experts = EXPERTS if path == "e" else 1
        low_rank = None
        if rank:
            a, b = torch.randn(experts * rank, width_in), torch.randn(width_out, experts * rank)
            low_rank = LowRank(a.to(dtype), b.to(dtype), experts=experts)
        update = torch.randn(width_out, width_in) * (torch.rand(width_out, width_in) < 0.3)
        more: dict[str, Any] = {}
        if path != "e":
            more = {
                "delta": torch.randn(width_out, width_in).to(dtype) if dense else None,
                "sparse": as_sparse(update.to(dtype)) if sparse else None,
                "shift": torch.randn(width_out).to(dtype) if shifted else None,
            }
        sites[path] = SiteForms(low_rank, **more)
    return CompiledAdapter(version, "TEST", sites)


def as_sparse(update: torch.Tensor) -> Sparse:
    starts = torch.nn.functional.pad(update.count_nonzero(1).cumsum(0), (1, 0)).int()
    rows, columns = update.nonzero(as_tuple=True)
    return Sparse(starts, columns.int(), update[rows, columns], update.shape[1])


def updates(sites: dict[str, SiteForms]) -> dict[tuple[str, str], torch.Tensor]:
    """The dense update and the shift of every site in fp64; of experts ``[experts, out, in]``."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for path, forms in sites.items():
        total = torch.zeros(EXPERTS if path == "e" else 1, *reversed(WIDTHS[path]), dtype=torch.double)
        if forms.low_rank is not None:
            a, b = forms.low_rank.a.double(), forms.low_rank.b.double()
            experts = forms.low_rank.experts
            total += b.view(len(b), experts, -1).transpose(0, 1) @ a.view(experts, -1, a.shape[1])
        if forms.delta is not None:
            total += forms.delta.double()
        if forms.sparse is not None:
            total += dense_of(forms.sparse)
        found[path, "weight"] = total
        found[path, "shift"] = torch.zeros(1) if forms.shift is None else forms.shift.double()
    return found


def dense_of(sparse: Sparse) -> torch.Tensor:
    dense = torch.zeros(len(sparse.starts) - 1, sparse.width, dtype=torch.double)
    rows = torch.arange(len(dense)).repeat_interleave(sparse.starts.diff().long())
    return dense.index_put_((rows, sparse.columns.long()), sparse.values.double(), accumulate=True)


def read_back(pool: SlotPool, placement: Placement) -> dict[str, SiteForms]:
    """What the kernels find at a placement, as forms again."""
    sites = {}
    for path, (_, width_out) in WIDTHS.items():
        rows = {p: pool.storage((path, p))[where] for (at, p), where in placement.rows.items() if at == path}
        experts = EXPERTS if path == "e" else 1
        low_rank = LowRank(rows[Part.A], rows[Part.B].T, experts=experts) if Part.A in rows else None
        sparse = None
        if Part.SPARSE in rows:
            sparse = Sparse(*unpack_rows(rows[Part.SPARSE], width_out), WIDTHS[path][0])
        shift = rows[Part.SHIFT][0] if Part.SHIFT in rows else None
        sites[path] = SiteForms(low_rank, delta=rows.get(Part.DELTA), sparse=sparse, shift=shift)
    return sites


def recipe_of(members: list[CompiledAdapter], weights: list[float], combination: Combination) -> Recipe:
    composition = Composition(
        tuple(Member(member.version, weight) for member, weight in zip(members, weights, strict=True)), combination
    )
    return Recipe.of(composition, {m.version: (replace(m, sites={}), Layout.of(m)) for m in members})


def both_ways(pool: SlotPool, recipe: Recipe, members: list[CompiledAdapter]) -> list[Placement]:
    """The composition made of rows on the device, if it can be, and of host memory."""
    by_version = {member.version: member for member in members}
    there = {}
    for version in recipe.sources:
        placement = pool.reserve(Layout.of(by_version[version]))
        assert placement is not None
        pool.upload(placement, by_version[version])
        there[version] = placement
    made = []
    for on_device in (True, False):
        if on_device and recipe.sparse:
            continue
        placement = pool.reserve(recipe.layout)
        assert placement is not None
        for place, rows in placement.rows.items():  # nothing may depend on what lay there
            pool.storage(place)[rows] = float("nan")
        if on_device:
            weigh(pool, placement, recipe, [there.get(m.version) for m in recipe.composition.members])
        else:
            pool.fill(placement, recipe.rows(by_version.__getitem__, pool.experts))
        made.append(placement)
    return made


def assert_same_rows(pool: SlotPool, placements: list[Placement], ulps: int = 1) -> None:
    first = placements[0]
    for other in placements[1:]:
        for place, rows in first.rows.items():
            mine, theirs = pool.storage(place)[rows], pool.storage(place)[other.rows[place]]
            torch.testing.assert_close(mine, theirs, rtol=ulps * torch.finfo(mine.dtype).eps, atol=1e-6)


FORMS = st.tuples(st.integers(0, 5), st.booleans(), st.booleans(), st.booleans())


@given(
    members=st.lists(st.dictionaries(st.sampled_from(sorted(WIDTHS)), FORMS, max_size=3), min_size=1, max_size=20),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_linear_is_the_weighed_sum_of_the_updates(members, data, dtype, seed) -> None:
    torch.manual_seed(seed)
    adapters = [random_member(f"v{index}", forms, dtype) for index, forms in enumerate(members)]
    weights = data.draw(st.lists(WEIGHTS, min_size=len(members), max_size=len(members)))
    if len(adapters) > 1:  # one adapter may be named twice
        adapters[-1] = adapters[data.draw(st.integers(0, len(adapters) - 1))]
    pool = make_pool(dtype)
    recipe = recipe_of(adapters, weights, "linear")
    placements = both_ways(pool, recipe, adapters)
    assert_same_rows(pool, placements)
    expected: dict[tuple[str, str], Any] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for where, update in updates(dict(adapter.sites)).items():
            expected[where] = expected.get(where, 0.0) + weight * update
    found = updates(read_back(pool, placements[-1]))
    for where, update in expected.items():
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.3}[dtype]
        torch.testing.assert_close(found[where] + 0 * update, update + 0 * found[where], rtol=0.02, atol=tolerance)
    for placement in placements:
        pool.publish(placement)
        pool.free(placement)


@given(
    rank=st.integers(1, 6),
    weights=st.lists(WEIGHTS, min_size=1, max_size=20),
    scales=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.7]), min_size=20, max_size=20),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_lorahub_is_the_product_of_the_weighed_sums_under_the_first_scale(rank, weights, scales, seed) -> None:
    torch.manual_seed(seed)
    shapes = {"q": (rank, 1), "e": (rank, EXPERTS)}
    saved = [
        {
            path: (torch.randn(r * experts, WIDTHS[path][0]), torch.randn(WIDTHS[path][1], r * experts))
            for path, (r, experts) in shapes.items()
        }
        for _ in weights
    ]
    adapters = [
        CompiledAdapter(
            f"v{index}",
            "LORA",
            {path: SiteForms(LowRank(a, b * s, experts=shapes[path][1], scale=s)) for path, (a, b) in factors.items()},
        )
        for index, (factors, s) in enumerate(zip(saved, scales, strict=False))
    ]
    pool = make_pool()
    placements = both_ways(pool, recipe_of(adapters, weights, "lorahub"), adapters)
    assert_same_rows(pool, placements)
    found = read_back(pool, placements[0])
    for path in shapes if any(weights) else ():
        a = sum(w * factors[path][0].double() for w, factors in zip(weights, saved, strict=True))
        b = sum(w * factors[path][1].double() for w, factors in zip(weights, saved, strict=True))
        low_rank = found[path].low_rank
        assert low_rank is not None
        torch.testing.assert_close(low_rank.a.double(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(low_rank.b.double(), scales[0] * b, rtol=1e-5, atol=1e-5)


def lora(version: str, rank: int = 2, scale: float | None = 1.0, **forms: Any) -> CompiledAdapter:
    low_rank = LowRank(torch.randn(rank, 12), torch.randn(20, rank), scale=scale)
    return CompiledAdapter(version, "LORA", {"q": SiteForms(low_rank, **forms)})


VECTOR = torch.randn(20)
NOT_ADDITIVE = {
    "Gain": lora("x", gain_out=VECTOR),
    "Rotation": lora("x", rotate_in=torch.randn(2, 12)),
    "Turn": lora("x", turn=Turn(torch.randn(2, 20), 2)),
    "Replace": CompiledAdapter("x", "LN", {"q": SiteForms(weight=VECTOR)}),
    "SoftPrompt": replace(lora("x"), prompt=SoftPrompt(torch.randn(2, 12))),
    "activated": replace(lora("x"), invocation=(1, 2)),
    "'task_id'": replace(lora("x"), choices=(Choice("task_id", 0, 3),)),
}


@pytest.mark.parametrize("combination", ["linear", "lorahub"])
@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_what_is_no_sum_is_refused_by_name(combination: Combination, name: str) -> None:
    with pytest.raises(NotComposable, match=rf"adapters\[1\].*{name}") as error:
        recipe_of([lora("a"), NOT_ADDITIVE[name], lora("b")], [1.0, 0.0, 1.0], combination)
    assert error.value.member == 1 and error.value.param == "adapters[1]"


LORAHUB_REFUSED = {
    "Bias": lora("x", shift=VECTOR),
    "Delta": lora("x", delta=torch.randn(20, 12)),
    "3 rows of A where the first adapter has 2": lora("x", rank=3),
    "made of others": lora("x", scale=None),
    "scale at 'q' is 0": lora("x", scale=0.0),
    "0 rows of A where the first adapter has 2": CompiledAdapter("x", "LORA", {}),
    "at 'o' it has 2 rows": CompiledAdapter(
        "x", "LORA", {**lora("x").sites, "o": SiteForms(LowRank(torch.randn(2, 20), torch.randn(12, 2), scale=1.0))}
    ),
}


@pytest.mark.parametrize("why", LORAHUB_REFUSED)
def test_lorahub_says_which_adapter_breaks_it(why: str) -> None:
    members = [lora("a"), lora("b"), LORAHUB_REFUSED[why]]
    with pytest.raises(NotComposable, match=why) as error:
        recipe_of(members, [1.0] * 3, "lorahub")
    assert error.value.member == 2
    if why != "0 rows of A where the first adapter has 2":
        recipe_of(members, [1.0] * 3, "linear")


def test_a_choice_with_a_default_is_made_as_by_default() -> None:
    recipe_of([replace(lora("x"), choices=(Choice("lora_rank", 1, 2, 2),))], [1.0], "linear")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39, True, "1", None])
def test_weights_are_finite_numbers(weight: Any) -> None:
    with pytest.raises(NotComposable, match=r"weight of adapters\[1\]") as error:
        recipe_of([lora("a"), lora("b")], [1.0, weight], "linear")
    assert error.value.param == "adapters[1].weight"


def test_there_are_members_and_a_known_combination() -> None:
    with pytest.raises(NotComposable, match="at least one"):
        Recipe.of(Composition((), "linear"), {})
    with pytest.raises(NotComposable, match="'combination'"):
        recipe_of([lora("a")], [1.0], "mean")  # type: ignore[arg-type]


@given(members=st.lists(st.tuples(st.sampled_from("abc"), WEIGHTS), min_size=1, max_size=6), data=st.data())
def test_an_identity_is_one_of_numbers(members, data) -> None:
    composition = Composition(tuple(Member(*member) for member in members), "linear")
    shuffled = Composition(tuple(data.draw(st.permutations(composition.members))), "linear")
    negated = Composition(
        tuple(replace(m, weight=-0.0 if m.weight == 0 else m.weight) for m in shuffled.members), "linear"
    )
    assert composition.identity == shuffled.identity == negated.identity
    assert composition.identity != Composition(composition.members, "lorahub").identity
    more = replace(composition.members[0], weight=composition.members[0].weight + 1.5)
    assert Composition((more, *composition.members[1:]), "linear").identity != composition.identity
    hub, first = Composition(composition.members, "lorahub"), composition.members[:1]
    rest = tuple(data.draw(st.permutations(composition.members[1:])))
    assert hub.identity == Composition(first + rest, "lorahub").identity and hub.canonical.members[:1] == first


@pytest.mark.parametrize("part", sorted(set(Part) - ADDITIVE))
def test_every_form_that_cannot_be_added_is_refused_by_its_name(part: Part) -> None:
    known = {"v": (CompiledAdapter("v", "LORA", {}), Layout({("q", part): 1}))}
    with pytest.raises(NotComposable, match=r"adapters\[0\] cannot be composed: [A-Z]\w+ is among its forms"):
        Recipe.of(Composition((Member("v", 1.0),), "linear"), known)
