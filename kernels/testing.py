"""What tests, benchmarks and trials at start share: the table of tolerances, samplers of workloads, random cases."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from weft.kernels import native
from weft.kernels.paged_attention import AttentionRows
from weft.kernels.slot_rows import SlotRows
from weft.kernels.sparse_rows import pack_rows

# (relative, absolute) difference allowed between two implementations of one op on inputs of unit scale. A 16-bit result
# may differ by one rounding of the result and one of an intermediate.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

Popularity = Literal["distinct", "uniform", "skewed", "identical"]


@contextmanager
def without_c() -> Iterator[None]:
    """Torch does all the work on CPUs meanwhile, as where there is no C compiler."""
    with mock.patch.object(native, "available", lambda source: False):
        yield


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


def random_rows(
    counts: Sequence[int], width: int, dtype: torch.dtype, *, scale: float = 1.0, seed: int = 0
) -> SlotRows:
    """Normal rows of size `scale`, `counts` of them per slot, in random places; every row not in use is NaN."""
    gen = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(count, width, generator=gen) * scale).to(dtype) for count in counts]
    return placed_rows(rows, width, dtype, gen)


def placed_rows(rows: Sequence[Tensor], width: int, dtype: torch.dtype, gen: torch.Generator) -> SlotRows:
    """The rows of every slot, in random places; every row not in use is NaN."""
    counts = [len(mine) for mine in rows]
    total = sum(counts)
    pool = torch.full((total + 2, width), float("nan"), dtype=dtype)
    places = torch.randperm(total + 2, generator=gen)
    table = torch.full((len(counts), max([*counts, 1])), int(places[-1]), dtype=torch.int32)
    for slot, (mine, at) in enumerate(zip(rows, places[:total].split(counts), strict=True)):
        table[slot, : len(at)] = at.sort().values
        pool[at.sort().values] = mine
    return SlotRows(pool, table, torch.tensor(counts, dtype=torch.int32), tuple(counts))


def random_sparse(
    densities: Sequence[float], width_in: int, width_out: int, dtype: torch.dtype, *, seed: int = 0
) -> SlotRows:
    """Sparse updates of these shares of values other than 0 by slot, none where it is 0; of unit scale."""
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for density in densities:
        update = torch.randn(width_out, width_in, generator=gen) * max(1.0, density * width_in) ** -0.5
        update *= torch.rand(width_out, width_in, generator=gen) < density
        starts = torch.nn.functional.pad(update.count_nonzero(1).cumsum(0), (1, 0)).int()
        values, columns = update[update != 0].to(dtype), update.nonzero()[:, 1].int()
        rows.append(pack_rows(starts, columns, values, width_in) if density else values.new_zeros(0, width_in))
    return placed_rows(rows, width_in, dtype, gen)


def random_factors(
    ranks: Sequence[int], width_in: int, width_out: int, dtype: torch.dtype, *, seed: int = 0
) -> tuple[SlotRows, SlotRows]:
    """Low-rank factors (a, b) with `ranks` per slot, scaled so that an update of unit rows is of unit scale."""
    a = random_rows(ranks, width_in, dtype, scale=width_in**-0.5, seed=seed)
    return a, random_rows(ranks, width_out, dtype, scale=max([*ranks, 1]) ** -0.5, seed=seed + 1)


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
