"""Section 2: grouped LoRA's bytes a second at the sites of real models, as a share of a copy's; the peers' beside."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gpu.budget import Share
from gpu.peers import Peer, Problem
from gpu.shapes import SHAPES, ranks_of, site_bytes, spread
from gpu.timing import Stopwatch
from weft.kernels.grouped_lora import grouped_lora
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import sample_slots

BATCHES = (1, 4, 16, 32, 64, 128, 256)
SITES = ("q_proj", "k_proj", "gate_proj", "down_proj")
PATTERNS = ("distinct", "uniform", "skewed", "identical")


@dataclass(frozen=True)
class Workload:
    """One launch.

    Attributes:
        pattern: how the rows are spread over the adapters: "even", or one of Punica's.
        rank: None: mixed.
        slots: of each row. ranks: of each slot.
    """

    model: str
    site: str
    pattern: str
    rank: int | None
    slots: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def adapters(self) -> int:
        return len(set(self.slots))

    @property
    def total_rank(self) -> int:
        """Of the adapters in the batch: N r."""
        return sum(self.ranks[slot] for slot in set(self.slots))


def workloads(models: Sequence[str], batches: Sequence[int] = BATCHES) -> Iterator[Workload]:
    """By importance: if the time runs out, less is lost of what comes first."""
    rng = np.random.default_rng(0)
    for model, batch, site in itertools.product(models, batches, SITES):
        for count, rank in itertools.product((1, 8, 64), (16, 64, 8, None)):
            if count <= batch:
                yield Workload(model, site, "even", rank, tuple(spread(batch, count)), tuple(ranks_of(count, rank)))
    for model, batch, pattern, rank in itertools.product(models, batches, PATTERNS, (16, None)):
        slots = sample_slots(pattern, batch, rng)  # type: ignore[arg-type]
        yield Workload(model, "q_proj", pattern, rank, tuple(slots), tuple(ranks_of(max(slots) + 1, rank)))


def measure(
    share: Share,
    device: torch.device,
    peers: Sequence[Peer],
    *,
    models: Sequence[str],
    batches: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Seconds and share of the copy's bandwidth for every workload, of ours and of each peer."""
    watch = Stopwatch(device)
    copy = watch.copy_bandwidth()
    nothing = torch.zeros(1, device=device)
    floor = watch.median(lambda: nothing.zero_())
    rows: list[dict[str, Any]] = []
    todo = list(workloads(models, batches))
    # Every other one first, so that what there is no time for is spread over all sizes.
    for done, workload in enumerate([*todo[::2], *todo[1::2]]):
        if share.over:
            share.skip(f"bandwidth: {len(todo) - done} of {len(todo)} workloads")
            break
        rows.append(_measure(workload, watch, copy, peers, device, dtype))
    return {
        "copy_bytes_per_second": copy,
        "seconds_of_one_empty_launch": floor,
        "bytes": "factors of the batch's adapters at their true rank once, x once, y read and written",
        "workloads": rows,
        "median_share": shares(rows),
    }


def _measure(
    workload: Workload, watch: Stopwatch, copy: float, peers: Sequence[Peer], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    width_in, width_out = SHAPES[workload.model].linears[workload.site]
    problem = make_problem(workload.slots, workload.ranks, width_in, width_out, device, dtype)
    nbytes = site_bytes(width_in, width_out, workload.slots, workload.ranks, dtype.itemsize)
    seconds = watch.median(lambda: ours(problem))
    figures = {"weft": {"seconds": seconds, "share": nbytes / seconds / copy}}
    expected = problem.y.clone().zero_()
    ours(problem, expected)
    for peer in peers:
        figures[peer.name] = _peer(peer, problem, expected, watch, nbytes, copy)
    slots, ranks = workload.slots, workload.ranks
    return {
        **{name: value for name, value in asdict(workload).items() if name not in ("slots", "ranks")},
        "batch": len(slots),
        "adapters": len(set(slots)),
        "total_rank": sum(ranks[slot] for slot in set(slots)),
        "bytes": nbytes,
        **figures,
    }


def _peer(
    peer: Peer, problem: Problem, expected: torch.Tensor, watch: Stopwatch, nbytes: int, copy: float
) -> dict[str, Any]:
    """A peer's seconds, and how far its result is from ours: a figure of a wrong result is none."""
    try:
        run = peer.prepare(problem)
        result = run(expected.clone().zero_())
        error = float((result.double() - expected.double()).norm() / expected.double().norm())
        seconds = watch.median(lambda: run(problem.y))
    except Exception as failed:  # whatever a peer's file needs and does not find
        return {"failed": f"{type(failed).__name__}: {failed}"[:300]}
    finally:
        peer.forget()
    return {"seconds": seconds, "share": nbytes / seconds / copy, "difference": error}


def ours(problem: Problem, y: torch.Tensor | None = None) -> None:
    """Both launches of grouped LoRA."""
    grouped_lora(problem.y if y is None else y, problem.x, problem.a, problem.b, problem.groups)


def make_problem(
    slots: Sequence[int], ranks: Sequence[int], width_in: int, width_out: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Random inputs on the device."""
    x = torch.randn(len(slots), width_in, device=device, dtype=dtype)
    y = torch.randn(len(slots), width_out, device=device, dtype=dtype)
    a, b = (device_rows(ranks, width, device, dtype) for width in (width_in, width_out))
    a.pool.mul_(width_in**-0.5)
    b.pool.mul_(max(ranks) ** -0.5)
    return Problem(y, x, a, b, RowGroups.build(slots, device), tuple(slots), tuple(ranks))


def device_rows(ranks: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> SlotRows:
    """Normal rows made on the device, those of a slot in adjacent places, the slots in random order."""
    order = list(range(len(ranks)))
    random.Random(0).shuffle(order)
    table = torch.zeros(len(ranks), max(ranks), dtype=torch.int32)
    at = 0
    for slot in order:
        table[slot, : ranks[slot]] = torch.arange(at, at + ranks[slot], dtype=torch.int32)
        at += ranks[slot]
    pool = torch.randn(at, width, device=device, dtype=dtype)
    counts = torch.tensor(list(ranks), dtype=torch.int32)
    return SlotRows(pool, table.to(device), counts.to(device), tuple(ranks))


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The median share of the copy's bandwidth by who ran, below and from N r = 512 on."""
    found: dict[str, dict[str, float]] = {}
    for who in sorted({name for row in rows for name, value in row.items() if isinstance(value, dict)}):
        for label, low, high in (("N r < 512", 0, 512), ("N r >= 512", 512, 1 << 30)):
            mine = [r[who]["share"] for r in rows if low <= r["total_rank"] < high and "share" in r.get(who, {})]
            if mine:
                found.setdefault(who, {})[label] = float(np.median(mine))
    return found
