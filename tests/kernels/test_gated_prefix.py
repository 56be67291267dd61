import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_grouped_lora import bits, rows_of
from weft.kernels.gated_prefix import Joint, gated_prefix, reference, triton
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import TOLERANCES, assert_close, random_rows

SLOTS = 4


def random_prefix(counts: list[int], width: int, head_dim: int, dtype: torch.dtype) -> tuple[SlotRows, SlotRows]:
    keys = random_rows(counts, width, dtype, scale=head_dim**-0.5, seed=3)
    return keys, random_rows(counts, width, dtype, seed=4)


def random_joint(rows: int, heads: int) -> Joint:
    gen = torch.Generator().manual_seed(8)
    return Joint(torch.randn(rows, heads, generator=gen) * 2, torch.rand(rows, 2, generator=gen), 0.7)


@pytest.mark.parametrize("implementation", [gated_prefix, triton.gated_prefix])
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40),
    counts=st.lists(st.sampled_from([0, 1, 5, 32, 70]), min_size=SLOTS, max_size=SLOTS),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 20, 64]),
    dtype=st.sampled_from(list(TOLERANCES)),
    strided=st.booleans(),
    joined=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(
    implementation, slots, counts, kv_heads, group, head_dim, dtype, strided, joined
) -> None:
    heads = kv_heads * group
    y = rows_of(heads * head_dim, len(slots), dtype, strided=strided, seed=1)
    q = torch.randn(heads, len(slots), head_dim, generator=torch.Generator().manual_seed(2)).to(dtype).transpose(0, 1)
    keys, values = random_prefix(counts, kv_heads * head_dim, head_dim, dtype)
    groups = RowGroups.build(slots, "cpu", block_rows=32 if strided else 16)
    joint = random_joint(len(slots), heads) if joined else None
    before, expected = y.clone(), y.clone()
    reference.gated_prefix(expected, q, keys, values, groups, joint)
    implementation(y, q, keys, values, groups, joint)
    assert_close(y, expected)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or not counts[slot]]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


def test_the_reference_is_the_formula() -> None:
    slots, (keys, values) = [1, -1, 0, 1], random_prefix([2, 5], 6, 3, torch.float32)
    y = rows_of(12, 4, torch.float32, strided=False, seed=1)
    q = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(2))
    expected = y.double()
    for t, slot in enumerate(slots):
        for head in range(4 if slot >= 0 else 0):
            at = slice(3 * (head // 2), 3 * (head // 2) + 3)
            scores = torch.stack([q[t, head].double() @ key[at].double() for key in keys.of(slot)])
            for weight, value in zip(scores.softmax(0), values.of(slot), strict=True):
                expected[t, 3 * head : 3 * head + 3] += weight * value[at].double()
    reference.gated_prefix(y, q, keys, values, RowGroups.build(slots, "cpu"))
    assert_close(y, expected.float())


@pytest.mark.parametrize("implementation", [gated_prefix, triton.gated_prefix])
def test_joined_it_is_one_softmax_over_both(implementation) -> None:
    """Attention over six keys of the row's own and five of the prefix, whose keys and values are gated."""
    gen = torch.Generator().manual_seed(1)
    prefix_keys, prefix_values = random_prefix([5], 6, 3, torch.float32)
    q, keys, values = (torch.randn(*shape, 3, generator=gen) for shape in ((2, 4), (6, 2), (6, 2)))
    gates = torch.rand(2, 2, generator=gen)
    own = torch.einsum("thd,nhd->thn", q, keys.repeat_interleave(2, 1)) * 0.7
    y = torch.einsum("thn,nhd->thd", own.softmax(-1), values.repeat_interleave(2, 1)).flatten(1)
    expected = torch.empty(2, 4, 3)
    for t in range(2):
        k = torch.cat([keys, gates[t, 0] * prefix_keys.of(0).view(5, 2, 3)]).repeat_interleave(2, 1)
        v = torch.cat([values, gates[t, 1] * prefix_values.of(0).view(5, 2, 3)]).repeat_interleave(2, 1)
        expected[t] = torch.einsum("hn,nhd->hd", (torch.einsum("hd,nhd->hn", q[t], k) * 0.7).softmax(-1), v)
    joint = Joint(own.logsumexp(-1), gates, 0.7)
    implementation(y, q, prefix_keys, prefix_values, RowGroups.build([0, 0], "cpu"), joint)
    assert_close(y, expected.flatten(1))


def test_large_scores_do_not_overflow() -> None:
    keys, values = random_prefix([40], 16, 16, torch.float32)
    y, q = torch.zeros(2, 16), torch.full((2, 1, 16), 1e4)
    groups = RowGroups.build([0, 0], "cpu")
    expected = y.clone()
    reference.gated_prefix(expected, q, keys, values, groups)
    triton.gated_prefix(y, q, keys, values, groups)
    assert_close(y, expected)
    assert bool(y.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    groups, (keys, values) = RowGroups.build([0, 0], "cpu"), random_prefix([4], 6, 3, torch.float32)
    y, q = torch.zeros(2, 12), torch.zeros(2, 4, 3)
    narrow = random_rows([4], 3, torch.float32)
    for wrong in (
        (y[:1], q, keys, values),
        (y, q[:1], keys, values),
        (y, q[:, :3], keys, values),
        (y, q, narrow, values),
        (y, q, keys, narrow),
        (torch.zeros(2, 9), q[:, :3], keys, values),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            gated_prefix(*wrong, groups)
    with pytest.raises(ValueError, match="keys"):
        gated_prefix(y, q, random_rows([3], 6, torch.float32), values, groups)
    for lse, gates in ((torch.ones(2, 3), torch.ones(2, 2)), (torch.ones(2, 4), torch.ones(2, 1))):
        with pytest.raises(ValueError, match="do not fit"):
            gated_prefix(y, q, keys, values, groups, Joint(lse, gates, 1.0))
    with pytest.raises(ValueError, match="dtypes must be equal"):
        gated_prefix(y.half(), q, keys, values, groups)
