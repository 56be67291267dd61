import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import rows_of
from weft.kernels.groups import RowGroups
from weft.kernels.mean_gates import MAX_GATES, Link, mean_gates, reference, triton
from weft.kernels.spans import Spans
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4
SPANS = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.sampled_from([1, 1, 2, 9, 70])), min_size=1, max_size=8)


def cut(spans: list[tuple[int, int]], block_rows: int = 16) -> tuple[list[int], Spans, RowGroups]:
    """Spans of a slot and a length each."""
    slots = [slot for slot, length in spans for _ in range(length)]
    built = Spans.build([length for _, length in spans], range(len(spans)), "cpu")
    return slots, built, RowGroups.build(slots, "cpu", block_rows=block_rows)


@pytest.mark.parametrize("implementation", [mean_gates, triton.mean_gates])
@given(
    spans=SPANS,
    counts=st.lists(st.sampled_from([0, 1, 2, 20]), min_size=SLOTS, max_size=SLOTS),
    links=st.lists(st.sampled_from(list(Link)), min_size=SLOTS, max_size=SLOTS),
    width=st.integers(20, 300),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_it_agrees_with_the_reference(implementation, spans, counts, links, width, dtype, strided) -> None:
    counts[0] = counts[0] or 1
    slots, built, groups = cut(spans, 32 if strided else 16)
    x = rows_of(width, len(slots), dtype, strided=strided, seed=1)
    gates = random_rows([n + 1 if n else 0 for n in counts], width, dtype, scale=width**-0.5, seed=2)
    which = torch.tensor(links, dtype=torch.int32)
    expected = reference.mean_gates(x, gates, which, built, groups)
    given_gates = implementation(x, gates, which, built, groups)
    assert given_gates.dtype == torch.float32 and given_gates.shape == (len(slots), max(counts))
    assert_close(given_gates, expected)
    for t, slot in enumerate(slots):
        assert bool((given_gates[t, counts[slot] if slot >= 0 else 0 :] == 1).all())


def test_the_reference_is_the_formula() -> None:
    spans = [(0, 3), (1, 1), (-1, 2), (1, 4), (0, 1)]
    _, built, groups = cut(spans)
    x, gates = rows_of(7, 11, torch.float32, strided=False, seed=1), random_rows([3, 4], 7, torch.float32, seed=2)
    links = torch.tensor([Link.SIGMOID, Link.SOFTMAX], dtype=torch.int32)
    result, start = reference.mean_gates(x, gates, links, built, groups), 0
    for slot, length in spans:
        expected = torch.ones(3, dtype=torch.float64)
        if slot >= 0:
            weight, bias = gates.of(slot)[:-1].double(), gates.of(slot)[-1, : slot + 2].double()
            scores = [weight @ x[t].double() + bias for t in range(start, start + length)]
            values = [s.softmax(0) if slot else 1 / (1 + (-s).exp()) for s in scores]
            expected[: slot + 2] = sum(values) / length
        for t in range(start, start + length):
            assert_close(result[t], expected.float())
        start += length


@pytest.mark.parametrize("implementation", [mean_gates, triton.mean_gates])
@pytest.mark.parametrize("link", Link)
def test_large_scores_do_not_overflow(implementation, link: Link) -> None:
    _, spans, groups = cut([(0, 2), (0, 1)])
    gates = random_rows([MAX_GATES + 1], 64, torch.float32)
    x = torch.full((3, 64), 1e4) * torch.tensor([[1.0], [-1.0], [1.0]])
    given_gates = implementation(x, gates, torch.tensor([link], dtype=torch.int32), spans, groups)
    assert bool(given_gates.isfinite().all())


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit for bit: the mean of a span is that of its own tokens, wherever they lie in the batch."""
    gates, links = random_rows([3, 3], 40, torch.float32), torch.tensor([1, 2], dtype=torch.int32)
    x = rows_of(40, 90, torch.float32, strided=False, seed=1)
    for implementation in (mean_gates, triton.mean_gates):
        _, spans, groups = cut([(0, 70)])
        alone = implementation(x[20:], gates, links, spans, groups)
        _, spans, groups = cut([(1, 9), (-1, 11), (0, 70)])
        among = implementation(x, gates, links, spans, groups)
        assert torch.equal(alone, among[20:])


def test_what_does_not_fit_is_refused() -> None:
    _, spans, groups = cut([(0, 2)])
    links, gates = torch.tensor([1], dtype=torch.int32), random_rows([3], 5, torch.float32)
    x = torch.zeros(2, 5)
    for wrong in (x[:1], torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            mean_gates(wrong, gates, links, spans, groups)
    with pytest.raises(ValueError, match="do not fit"):
        mean_gates(x, gates, links, Spans.build([3], [0], "cpu"), groups)
    for count in (0, 1, 7, MAX_GATES + 2):
        with pytest.raises(ValueError, match="a row for each gate"):
            mean_gates(x, random_rows([count], 5, torch.float32), links, spans, groups)
    with pytest.raises(ValueError, match="dtypes must be equal"):
        mean_gates(x.half(), gates, links, spans, groups)
