"""Section 2, second half: a linear of the base and its low-rank updates, in each of the ways to run them.

What the thresholds of ``kernels/grouped_lora/fused.py`` and ``adapters/overlap.py`` are to be set by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gpu.bandwidth import SITES, make_problem
from gpu.budget import Share
from gpu.peers import Problem
from gpu.shapes import SHAPES, ranks_of, spread
from gpu.timing import Stopwatch
from weft.adapters.overlap import Overlap, overlap_for
from weft.kernels.grouped_lora import expand, fused, shrink
from weft.kernels.grouped_lora.fused import MAX_RANK, one_launch_pays

# (adapters, rank; None: mixed), around where one launch may be better.
SETS = ((1, 16), (8, 16), (1, 8), (4, 16), (1, 64), (8, 8), (64, 16), (8, None))


def measure(
    share: Share, device: torch.device, *, models: Sequence[str], batches: Sequence[int], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Seconds of every way at every size there is time for, and which way would be chosen now."""
    watch, overlap, rows = Stopwatch(device), overlap_for(device), []
    todo = [
        (batch, name, site, count, rank)
        for batch, (count, rank), name, site in itertools.product(batches, SETS, models, SITES)
        if count <= batch
    ]
    # Every other one first, so that what there is no time for is spread over all sizes.
    for done, (batch, name, site, count, rank) in enumerate([*todo[::2], *todo[1::2]]):
        if share.over:
            share.skip(f"ways to run an update: {len(todo) - done} of {len(todo)}")
            break
        width_in, width_out = SHAPES[name].linears[site]
        problem = make_problem(spread(batch, count), ranks_of(count, rank), width_in, width_out, device, dtype)
        weight = torch.randn(width_out, width_in, device=device, dtype=dtype) * width_in**-0.5
        seconds = {way: watch.median(run) for way, run in ways(problem, weight, overlap)}
        chosen = one_launch_pays(problem.groups.num_tiles, problem.a.padded_count, width_in, dtype.itemsize)
        sizes = {"model": name, "site": site, "batch": batch, "adapters": count, "rank": rank}
        rows.append({**sizes, "one_launch_chosen": chosen, "seconds": seconds})
    return rows


def ways(
    problem: Problem, weight: torch.Tensor, overlap: Overlap | None
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The product alone and with its updates, each of which returns y."""
    x, a, b, groups = problem.x, problem.a, problem.b, problem.groups

    def product() -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    def after() -> torch.Tensor:
        y = product()
        expand(y, shrink(x, a, groups), b, groups)
        return y

    def beside() -> torch.Tensor:
        assert overlap is not None
        planes = shrink(x, a, groups, overlap.fork())
        y = product()
        overlap.join()
        expand(y, planes, b, groups)
        return y

    def in_one() -> torch.Tensor:
        y = product()
        fused.grouped_lora(y, x, a, b, groups)
        return y

    yield "product alone", product
    yield "two launches after", after
    if overlap is not None:
        yield "one beside, one after", beside
    if a.max_count <= MAX_RANK:
        yield "one launch after", in_one


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of what each way takes of two launches after the product, over all sizes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for way, seconds in row["seconds"].items():
            found.setdefault(way, []).append(seconds / row["seconds"]["two launches after"])
    return {way: sorted(each)[len(each) // 2] for way, each in found.items()}
