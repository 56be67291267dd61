import ctypes
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from weft.kernels import native
from weft.kernels.paged_attention import (
    AttentionRows,
    LogSumExp,
    cpu,
    decode,
    paged_attention,
    plan,
    reference,
    triton,
    write_kv,
)
from weft.kernels.testing import TOLERANCES, AttentionCase, assert_close, random_attention, without_c

HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (7, 1)])


@st.composite
def cases(draw: st.DrawFn, max_rows: int, max_query: int, max_context: int) -> tuple[AttentionCase, dict]:
    query_lens = draw(st.lists(st.one_of(st.just(1), st.integers(1, max_query)), min_size=1, max_size=max_rows))
    context_lens = [query + draw(st.integers(0, max_context)) for query in query_lens]
    heads, kv_heads = draw(HEADS)
    head_dim = draw(st.sampled_from([3, 16, 20, 33]))
    case = random_attention(
        query_lens,
        context_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 12])),
        page_size=draw(st.sampled_from([1, 3, 8, 16])),
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        seed=draw(st.integers(0, 3)),
    )
    options = {
        "scale": draw(st.sampled_from([0.1, head_dim**-0.5])),
        "window": draw(st.none() | st.integers(1, 40)),
        "softcap": draw(st.none() | st.sampled_from([0.5, 5.0])),
        "sinks": draw(st.none() | st.just(torch.linspace(-2, 3, heads))),
    }
    return case, options


class Torch:
    """The CPU path where there is no C compiler."""

    @staticmethod
    def paged_attention(*args, **options) -> Tensor:
        with without_c():
            return cpu.paged_attention(*args, **options)

    @staticmethod
    def write_kv(*args) -> None:
        with without_c():
            cpu.write_kv(*args)


def inputs(case: AttentionCase) -> tuple[Tensor, Tensor, Tensor, AttentionRows]:
    return case.q, case.k_cache, case.v_cache, case.rows


@given(cases(max_rows=4, max_query=30, max_context=90))
@settings(deadline=None, max_examples=60)
def test_triton_agrees_with_the_reference(drawn: tuple[AttentionCase, dict]) -> None:
    case, options = drawn
    assert_close(triton.paged_attention(*inputs(case), **options), reference.paged_attention(*inputs(case), **options))


@pytest.mark.parametrize("implementation", [paged_attention, Torch.paged_attention])
@given(drawn=cases(max_rows=12, max_query=50, max_context=600))
@settings(deadline=None, max_examples=100)
def test_the_cpu_agrees_with_the_reference(implementation, drawn: tuple[AttentionCase, dict]) -> None:
    case, options = drawn
    assert_close(implementation(*inputs(case), **options), reference.paged_attention(*inputs(case), **options))


def test_there_is_a_kernel_in_c_for_this_machine() -> None:
    """Or what is tested here would be torch's work alone."""
    assert isinstance(native.compiled(decode.SOURCE), ctypes.CDLL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    lens = [1, 255, 256, 257, 3000]
    case = random_attention([1] * 5, lens, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    together = paged_attention(*inputs(case), scale=0.2)
    assert_close(together, reference.paged_attention(*inputs(case), scale=0.2))
    for r, (total, pages) in enumerate(zip(lens, case.rows.page_tables, strict=True)):
        alone = AttentionRows.build([1], [total], [pages.tolist()], case.rows.page_size, "cpu")
        assert torch.equal(
            paged_attention(case.q[r : r + 1], case.k_cache, case.v_cache, alone, scale=0.2)[0], together[r]
        )


def test_what_is_not_a_number_stays_in_its_row() -> None:
    case = random_attention([1, 1, 1], [40, 300, 20], heads=4, kv_heads=2, head_dim=16)
    expected = reference.paged_attention(*inputs(case), scale=0.2)
    case.k_cache[case.rows.page_table[1, 2].long(), 3, 1] = float("nan")
    result = paged_attention(*inputs(case), scale=0.2)
    assert result[1, 2:].isnan().all() and not result[1, :2].isnan().any()
    assert_close(result[[0, 2]], expected[[0, 2]])


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    case = random_attention([1], [40], heads=1, kv_heads=1, head_dim=16)
    case.q.fill_(1.0)
    case.k_cache[case.rows.page_table[0, 0].long(), :, :, 0] = float("-inf")
    assert_close(paged_attention(*inputs(case), scale=0.2), reference.paged_attention(*inputs(case), scale=0.2))


@pytest.mark.parametrize("implementation", [paged_attention, Torch.paged_attention, triton.paged_attention])
@given(drawn=cases(max_rows=4, max_query=20, max_context=60))
@settings(deadline=None, max_examples=30)
def test_log_sum_exps_of_the_rows_that_are_wanted(implementation, drawn: tuple[AttentionCase, dict]) -> None:
    case, options = drawn
    wanted = tuple(range(0, len(case.rows.query_lens), 2))
    given_lse, expected = (LogSumExp(torch.zeros(case.q.shape[:2]), wanted) for _ in range(2))
    result = implementation(*inputs(case), **options, lse=given_lse)
    assert_close(result, reference.paged_attention(*inputs(case), **options, lse=expected))
    starts = case.rows.query_starts.tolist()
    tokens = [t for r in wanted for t in range(starts[r], starts[r + 1])]
    torch.testing.assert_close(given_lse.values[tokens], expected.values[tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(40, 1, 16), (2, 1, 80), (2, 2, 96), (2, 1, 256)])
@pytest.mark.parametrize("implementation", [cpu, Torch, triton])
def test_wide_heads_and_groups(implementation, heads: int, kv_heads: int, head_dim: int) -> None:
    case = random_attention([1, 9], [70, 9], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    result = implementation.paged_attention(*inputs(case), scale=head_dim**-0.5)
    assert_close(result, reference.paged_attention(*inputs(case), scale=head_dim**-0.5))


@pytest.mark.parametrize("implementation", [reference, cpu, Torch, triton])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("flavour", ["gemma2", "gpt_oss"])
def test_agrees_with_eager_attention_of_transformers(implementation, window: int | None, flavour: str) -> None:
    query_lens, context_lens = [1, 6, 20], [33, 40, 20]
    case = random_attention(query_lens, context_lens, heads=6, kv_heads=2, head_dim=16, page_size=4)
    module = SimpleNamespace(num_key_value_groups=3, training=False, sinks=torch.linspace(-1, 2, 6))
    options = {"softcap": 1.5} if flavour == "gemma2" else {"sinks": module.sinks}
    eager = {"gemma2": modeling_gemma2, "gpt_oss": modeling_gpt_oss}[flavour].eager_attention_forward
    visible = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    expected, start = [], 0
    for r, (query, total) in enumerate(zip(query_lens, context_lens, strict=True)):
        pages = case.rows.page_table[r, : -(-total // 4)].long()
        keys, values = (cache[pages].flatten(0, 1)[None, :total].transpose(1, 2) for cache in inputs(case)[1:3])
        at, key = torch.arange(total - query, total)[:, None], torch.arange(total)
        mask = torch.zeros(query, total).masked_fill(~(visible(0, 0, at, key) & (key <= at)), float("-inf"))
        queries = case.q[None, start : start + query].transpose(1, 2)
        softcap = {"softcap": 1.5} if flavour == "gemma2" else {}
        out, _ = eager(module, queries, keys, values, mask[None, None], scaling=0.25, **softcap)
        expected.append(out[0])
        start += query
    result = implementation.paged_attention(*inputs(case), scale=0.25, window=window, **options)
    assert_close(result, torch.cat(expected))


@pytest.mark.parametrize("implementation", [reference, cpu, Torch, triton])
def test_pages_the_window_has_passed_are_not_read(implementation) -> None:
    case = random_attention([1, 5], [70, 64], heads=4, kv_heads=2, head_dim=16, page_size=8)
    options = {"scale": 0.25, "window": 20}
    expected = reference.paged_attention(*inputs(case), **options)
    for row, passed in ((0, 6), (1, 5)):  # 70 - 20 = 50 -> 6 whole pages; 64 - 5 + 1 - 20 = 40 -> 5
        case.k_cache[case.rows.page_table[row, :passed].long()] = float("nan")
        case.v_cache[case.rows.page_table[row, :passed].long()] = float("nan")
    assert_close(implementation.paged_attention(*inputs(case), **options), expected)


@pytest.mark.parametrize("implementation", [reference, cpu, Torch, triton])
def test_rows_sharing_pages(implementation) -> None:
    case = random_attention([1, 1], [40, 40], heads=2, kv_heads=2, head_dim=16, page_size=16)
    first, last = case.rows.page_table[0].tolist(), case.rows.page_table[1].tolist()
    shared = AttentionRows.build([1, 1], [40, 40], [first, [*first[:2], last[2]]], 16, "cpu")
    q, k, v, _ = inputs(case)
    alone = AttentionRows.build([1], [40], [[*first[:2], last[2]]], 16, "cpu")
    expected = reference.paged_attention(q[1:], k, v, alone, scale=0.25)
    assert_close(implementation.paged_attention(q, k, v, shared, scale=0.25)[1:], expected)


@pytest.mark.parametrize("implementation", [reference, cpu, Torch, triton])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_write_kv_writes_the_new_tokens_and_nothing_else(implementation, dtype: torch.dtype) -> None:
    caches = [torch.full((6, 4, 3, width), float("nan"), dtype=dtype) for width in (5, 7)]
    # As a model makes them: [heads, T, d] transposed, so that a token's heads are far apart.
    new = [torch.randn(3, 9, width).to(dtype).transpose(0, 1) for width in (5, 7)]
    slots = torch.randperm(24)[:9]
    implementation.write_kv(*caches, *new, slots)
    for cache, values in zip(caches, new, strict=True):
        assert torch.equal(cache.flatten(0, 1)[slots], values)
        others = [slot for slot in range(24) if slot not in slots.tolist()]
        assert cache.flatten(0, 1)[others].isnan().all()


@given(st.data())
@settings(deadline=None)
def test_the_metadata_of_rows(data: st.DataObject) -> None:
    page_size = data.draw(st.integers(1, 5))
    query_lens = data.draw(st.lists(st.integers(1, 6), max_size=5))
    context_lens = [query + data.draw(st.integers(0, 9)) for query in query_lens]
    pages = iter(data.draw(st.permutations(range(80))))
    tables = [[next(pages) for _ in range(-(-total // page_size))] for total in context_lens]
    rows = AttentionRows.build(query_lens, context_lens, tables, page_size, "cpu")
    positions = [
        (r, p)
        for r, (query, total) in enumerate(zip(query_lens, context_lens, strict=True))
        for p in range(total - query, total)
    ]
    assert rows.positions.tolist() == [p for _, p in positions]
    assert rows.slot_mapping.tolist() == [tables[r][p // page_size] * page_size + p % page_size for r, p in positions]
    assert rows.query_starts.tolist() == [sum(query_lens[:r]) for r in range(len(query_lens) + 1)]
    assert rows.context_lens.tolist() == context_lens and rows.num_tokens == sum(query_lens)


def test_layers_share_the_plan_of_a_step() -> None:
    case = random_attention([1, 1, 4], [9, 90, 4], heads=2, kv_heads=1, head_dim=16)
    for window in (None, 8, None, 8):
        Torch.paged_attention(*inputs(case), scale=1.0, window=window)
    assert len(case.rows._plans) == 2


def test_decode_rows_of_very_unequal_length_are_padded_apart() -> None:
    lens = [16 * n for n in (1, 2, 2, 60, 61, 64)]
    case = random_attention([1] * 6, lens, heads=1, kv_heads=1, head_dim=8)
    buckets = plan.plan(case.rows, None, torch.float32, decode=True)
    assert [(bucket.num_rows, bucket.length) for bucket in buckets] == [(3, 1024), (3, 32)]


def test_write_kv_of_the_public_op() -> None:
    k_cache, v_cache = torch.zeros(2, 4, 1, 3), torch.zeros(2, 4, 1, 3)
    write_kv(k_cache, v_cache, torch.ones(1, 1, 3), torch.full((1, 1, 3), 2.0), torch.tensor([5]))
    assert k_cache.sum() == 3 and k_cache[1, 1].sum() == 3 and v_cache[1, 1].sum() == 6


def test_an_empty_batch() -> None:
    rows = AttentionRows.build([], [], [], 4, "cpu")
    cache = torch.zeros(2, 4, 1, 8)
    for implementation in (reference, cpu, Torch, triton):
        assert implementation.paged_attention(torch.zeros(0, 2, 8), cache, cache, rows, scale=1.0).shape == (0, 2, 8)
        implementation.write_kv(cache, cache, torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), rows.slot_mapping)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, rows = inputs(random_attention([1, 2], [5, 6], heads=4, kv_heads=2, head_dim=8, page_size=4))
    for bad, match in (
        ((q[:2], k, v, rows), "does not fit 3 tokens"),
        ((q[:, :3], k, v, rows), "does not fit"),
        ((q, k[:, :2], v, rows), "pages of 4"),
        ((q, k, v[:1], rows), "different pages"),
        ((q.half(), k, v, rows), "dtypes must be equal"),
    ):
        with pytest.raises(ValueError, match=match):
            paged_attention(*bad, scale=1.0)
    with pytest.raises(ValueError, match="window is 0"):
        paged_attention(q, k, v, rows, scale=1.0, window=0)
    with pytest.raises(ValueError, match="one logit for each of 4 heads"):
        paged_attention(q, k, v, rows, scale=1.0, sinks=torch.zeros(2))
    for arguments, match in (
        (([1], [1, 2], [[0]]), "context_lens 2"),
        (([2], [1], [[0]]), "query_lens 2 of context_lens 1"),
        (([0], [1], [[0]]), "query_lens 0"),
        (([1], [9], [[0, 1]]), "2 pages of 4 for 9 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            AttentionRows.build(*arguments, 4, "cpu")
