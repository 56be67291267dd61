"""What tests and benchmarks share: the one table of tolerances, the workload samplers, and builders of random cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weft.kernels.grouped_lora import RankPages
from weft.kernels.paged_attention import AttentionRows

# (relative, absolute) difference allowed between two implementations of one op on inputs of unit scale. A 16-bit result
# may differ by one rounding of the result and one of an intermediate.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

Popularity = Literal["distinct", "uniform", "skewed", "identical"]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless the two agree within the tolerance of their dtype."""
    rtol, atol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def sample_slots(popularity: Popularity, rows: int, rng: np.random.Generator) -> list[int]:
    """The slot of each row under one of Punica's four popularity patterns (Chen et al. 2023, section 7).

    distinct: every row its own adapter; identical: one for all; uniform: ceil(sqrt(rows)) adapters, equally likely;
    skewed: the i-th most popular adapter gets 1.5 times the rows of the next (Zipf-1.5 as Punica defines it).
    """
    if popularity == "distinct":
        return list(range(rows))
    if popularity == "identical":
        return [0] * rows
    adapters = int(np.ceil(np.sqrt(rows)))
    if popularity == "uniform":
        return [int(s) for s in rng.integers(0, adapters, rows)]
    weights = 1.5 ** -np.arange(rows, dtype=np.float64)
    return [int(s) for s in rng.choice(rows, rows, p=weights / weights.sum())]


def random_pages(
    ranks: Sequence[int], width_in: int, width_out: int, dtype: torch.dtype, *, page: int = 8, seed: int = 0
) -> RankPages:
    """Low-rank weights of one site with `ranks` per slot, pages in random order; every row not in use is NaN."""
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = [-(-rank // page) for rank in ranks]
    pool_pages, columns = sum(counts) + 2, max([*counts, 1])

    def pool(width: int) -> tuple[Tensor, Tensor]:
        values = torch.full((pool_pages, page, width), float("nan"), dtype=dtype)
        free = rng.permutation(pool_pages)
        tables = torch.full((len(ranks), columns), int(free[-1]), dtype=torch.int32)
        for slot, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
            mine, free = free[:count], free[count:]
            tables[slot, :count] = torch.from_numpy(mine.astype(np.int32))
            for j in range(rank):
                # Scaled so that a product of unit rows is of unit scale.
                values[int(mine[j // page]), j % page] = torch.randn(width, generator=gen).to(dtype)
        return values, tables

    a_pool, a_pages = pool(width_in)
    b_pool, b_pages = pool(width_out)
    a_pool *= width_in**-0.5
    b_pool *= max([*ranks, 1]) ** -0.5
    return RankPages(a_pool, b_pool, a_pages, b_pages, torch.tensor(ranks, dtype=torch.int32), max([*ranks, 0]))


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """Inputs of `paged_attention`: q [T, heads, d], the two caches, the rows."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: AttentionRows


def random_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """Rows with random keys and values in pages in random order; whatever belongs to no row is NaN."""
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = [-(-total // page_size) for total in context_lens]
    free = rng.permutation(sum(counts) + 2).tolist()
    tables = []
    for count in counts:
        tables.append(free[:count])
        free = free[count:]
    used = torch.tensor(
        [
            pages[i // page_size] * page_size + i % page_size
            for pages, total in zip(tables, context_lens, strict=True)
            for i in range(total)
        ],
        dtype=torch.long,
    )

    def cache(width: int) -> Tensor:
        values = torch.full((sum(counts) + 2, page_size, kv_heads, width), float("nan"), dtype=dtype)
        values.flatten(0, 1)[used] = torch.randn(len(used), kv_heads, width, generator=gen).to(dtype)
        return values

    q = torch.randn(sum(query_lens), heads, head_dim, generator=gen).to(dtype)
    rows = AttentionRows.build(query_lens, context_lens, tables, page_size, "cpu")
    return AttentionCase(q, cache(head_dim), cache(value_dim or head_dim), rows)
