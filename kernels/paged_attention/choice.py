"""Which backend attends, found where it runs: each is tried on random rows, and the quickest right one is kept.

Right is what agrees with `reference` in fp32 within the table of tolerances. Keys and values beyond the rows' tokens
are NaN, and where steps are captured, the rows that are compared are not those that were captured.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.kernels.testing import AttentionCase, assert_close, random_attention

from . import paged_attention, reference
from .backends import Attend, Backend, Layer
from .rows import AttentionRows, LogSumExp

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a step one that does the same on the same memory each time it is called."""
Clock = Callable[[Callable[[], None]], float]
"""Seconds that a step takes."""

WINDOW, SOFTCAP = 37, 2.0
"""At most: on the short rows of a trial, larger ones would change nothing."""
DECODING = ((1, 15, 16, 17, 250, 700), (1900, 1433), (2500,))
"""Tokens in total of rows that decode. Few long ones are where backends cut rows into parts."""
MIXED = (
    ((300,), (300,)),
    ((1, 17, 33, 1, 5, 129), (40, 17, 52, 1, 300, 129)),
    ((1, 64, 1), (1900, 1433, 700)),
)
"""New tokens and tokens in total of rows some of which are prompts, or parts of them."""
TIMED_DECODING, TIMED_MIXED = (16, 1024), 512
"""What is timed: rows that decode and their tokens; new tokens of a prompt, beside as many rows of half as many."""


@dataclass(frozen=True)
class Place:
    """Where attention runs.

    Attributes:
        most: tokens of a row at most.
        capture: records steps that decode; None: they are launched each time.
    """

    device: torch.device
    dtype: torch.dtype
    page_size: int
    most: int
    capture: Capture | None


@dataclass(frozen=True)
class Verdict:
    """What was found of one backend for one layer and kind of step.

    Attributes:
        unfit: why it was not tried. problem: why it is left out.
        seconds: of a step's attention in all such layers; None where there is nothing to choose.
    """

    name: str
    unfit: str | None = None
    problem: str | None = None
    seconds: float | None = None

    @property
    def right(self) -> bool:
        return self.unfit is None and self.problem is None


@torch.inference_mode()
def judge(
    backends: Sequence[Backend], layer: Layer, count: int, place: Place, *, decoding: bool, clock: Clock | None = None
) -> list[Verdict]:
    """Tries every backend on steps of one kind; the right ones are timed where there are several.

    Args:
        count: layers like this.
        clock: what times them; None: events on a GPU, else wall time.
    """
    verdicts = [_judge(backend, layer, place, decoding, seed) for seed, backend in enumerate(backends)]
    if sum(verdict.right for verdict in verdicts) < 2:
        return verdicts
    measure = clock or _clock(place.device)
    return [
        replace(verdict, seconds=measure(_timed(backend, layer, count, place, decoding))) if verdict.right else verdict
        for backend, verdict in zip(backends, verdicts, strict=True)
    ]


def quickest(backends: Sequence[Backend], verdicts: Sequence[Verdict]) -> Backend | None:
    """The one to take; None if none is right."""
    right = [(verdict.seconds or 0.0, index) for index, verdict in enumerate(verdicts) if verdict.right]
    return backends[min(right)[1]] if right else None


class Chosen:
    """Attends by the backend that was chosen for the layer and the kind of step.

    Args:
        table: by layer, and by whether all rows decode. What is not in it, and whoever asks for the denominators, gets
            weft's own kernel.
    """

    def __init__(self, table: Mapping[tuple[Layer, bool], Backend]) -> None:
        self._table = {key: backend.attend for key, backend in table.items()}

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: AttentionRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        lse: LogSumExp | None = None,
    ) -> Tensor:
        """See `weft.kernels.paged_attention.paged_attention`."""
        sizes = q.shape[1], k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
        layer = Layer(*sizes, window, softcap, sinks is not None)
        attend: Attend = paged_attention
        if lse is None:
            attend = self._table.get((layer, rows.decoding), paged_attention)
        return attend(q, k_cache, v_cache, rows, scale=scale, window=window, softcap=softcap, sinks=sinks, lse=lse)


def _judge(backend: Backend, layer: Layer, place: Place, decoding: bool, seed: int) -> Verdict:
    captured = decoding and place.capture is not None
    unfit = backend.unfit(layer, place.dtype, place.page_size)
    if unfit is None and captured and not backend.capturable:
        unfit = "CUDA graphs cannot hold it"
    if unfit is not None:
        return Verdict(backend.name, unfit=unfit)
    # Each backend has rows of its own: memory that it does not write must not hold another one's right result.
    for case in _cases(layer, place, decoding, 100 * seed):
        problem = _problem(backend, layer, case, place if captured else None)
        if problem is not None:
            return Verdict(
                backend.name, problem=f"on {case.rows.query_lens} of {case.rows.total_lens} tokens: {problem}"
            )
    return Verdict(backend.name)


def _problem(backend: Backend, layer: Layer, case: AttentionCase, captured_at: Place | None) -> str | None:
    """What is wrong with a backend on these rows."""
    try:
        if captured_at is None:
            _check(backend, layer, case)
        else:
            _check_captured(backend, layer, case, captured_at)
    except Exception as error:  # whatever a library may raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines[:4])}"
    return None


def _cases(layer: Layer, place: Place, decoding: bool, seed: int) -> Iterator[AttentionCase]:
    """Random rows of the layer's shape, as long as the place allows."""
    sizes = [((1,) * len(totals), totals) for totals in DECODING] if decoding else MIXED
    for index, (queries, totals) in enumerate(sizes):
        fitting = [min(total, place.most) for total in totals]
        yield _random(layer, place, [min(pair) for pair in zip(queries, fitting, strict=True)], fitting, seed + index)


def _random(layer: Layer, place: Place, queries: Sequence[int], totals: Sequence[int], seed: int) -> AttentionCase:
    case = random_attention(
        queries,
        totals,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim,
        page_size=place.page_size,
        dtype=place.dtype,
        seed=seed,
    )
    tables = case.rows.page_tables.tolist()
    rows = AttentionRows.build(queries, totals, tables, place.page_size, place.device)
    # Heads outside, as a model's projections may leave them.
    q = case.q.to(place.device).transpose(0, 1).contiguous().transpose(0, 1)
    return AttentionCase(q, case.k_cache.to(place.device), case.v_cache.to(place.device), rows)


def _options(layer: Layer, case: AttentionCase) -> dict[str, Any]:
    """What a call asks for: the layer's own, bounded so that it makes a difference."""
    sinks = torch.linspace(-1, 2, layer.heads).to(case.q) if layer.sinks else None
    return {
        "scale": layer.head_dim**-0.5,
        "window": None if layer.window is None else min(layer.window, WINDOW),
        "softcap": None if layer.softcap is None else min(layer.softcap, SOFTCAP),
        "sinks": sinks,
    }


def _check(backend: Backend, layer: Layer, case: AttentionCase) -> None:
    options = _options(layer, case)
    _compare(backend.attend(case.q, case.k_cache, case.v_cache, case.rows, **options), case, options)


def _check_captured(backend: Backend, layer: Layer, case: AttentionCase, place: Place) -> None:
    """Records a step, puts other rows in its place, and runs it again."""
    assert place.capture is not None
    options, rows = _options(layer, case), _as_captured(case.rows, place)
    q = case.q.clone()
    out = q.new_empty(*q.shape[:2], layer.value_dim)

    def step() -> None:
        out.copy_(backend.attend(q, case.k_cache, case.v_cache, rows, **options))

    run = place.capture(step)
    totals = [max(1, total - 1) for total in reversed(case.rows.total_lens)]
    tables = np.flip(case.rows.page_tables, 0)
    queries = case.rows.query_lens
    other = AttentionRows.build(queries, totals, tables.tolist(), place.page_size, place.device)
    q.copy_(case.q.flip(0))
    rows.context_lens.copy_(other.context_lens)
    rows.page_table[:, : tables.shape[1]].copy_(other.page_table)
    run()
    _compare(out, replace(case, q=q, rows=other), options)


def _as_captured(rows: AttentionRows, place: Place) -> AttentionRows:
    """Rows as a graph has them: the host knows how many there are, the page table is as wide as it may get."""
    count = len(rows.query_lens)
    table = rows.page_table.new_zeros(count, -(-place.most // place.page_size))
    table[:, : rows.page_table.shape[1]] = rows.page_table
    unknown = np.zeros((count, 0), dtype=np.int32)
    ones = (1,) * count
    return replace(
        rows,
        context_lens=rows.context_lens.clone(),
        page_table=table,
        query_lens=ones,
        total_lens=ones,
        page_tables=unknown,
        _plans={},
    )


def _compare(out: Tensor, case: AttentionCase, options: dict[str, Any]) -> None:
    """With the reference, which computes in fp32 and rounds once."""
    assert_close(out, reference.paged_attention(case.q, case.k_cache, case.v_cache, case.rows, **options))


def _timed(backend: Backend, layer: Layer, count: int, place: Place, decoding: bool) -> Callable[[], None]:
    """The attention of one step in all layers."""
    number, length = TIMED_DECODING
    queries = [1] * number if decoding else [min(TIMED_MIXED, place.most), *[1] * number]
    totals = [min(length, place.most)] * number if decoding else [queries[0], *[min(length // 2, place.most)] * number]
    case = _random(layer, place, queries, totals, 0)
    options = {**_options(layer, case), "window": layer.window}
    captured = decoding and place.capture is not None

    def step(rows: AttentionRows) -> None:
        for _ in range(count):
            backend.attend(case.q, case.k_cache, case.v_cache, rows, **options)

    if captured and place.capture is not None:
        rows = _as_captured(case.rows, place)
        return place.capture(lambda: step(rows))
    return lambda: step(replace(case.rows, _plans={}))


def _clock(device: torch.device) -> Clock:
    return _device_seconds if device.type == "cuda" else _wall_seconds


def _device_seconds(step: Callable[[], None], repeats: int = 7) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        step()
        stop.record()
    torch.cuda.synchronize()
    milliseconds = statistics.median(float(start.elapsed_time(stop)) for start, stop in events)
    return milliseconds / 1e3


def _wall_seconds(step: Callable[[], None], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
