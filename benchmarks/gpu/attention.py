"""Section 3: every attention backend that is there, against fp64 amid NaN, and timed beside weft's own kernel."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gpu.budget import Share
from gpu.double import in_double, moved, relative_error, widened
from gpu.shapes import SHAPES, Shape
from gpu.timing import Stopwatch
from weft.kernels.paged_attention import AttentionRows, reference
from weft.kernels.paged_attention.backends import Backend, Layer, present
from weft.kernels.testing import TOLERANCES, AttentionCase, random_attention

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PAGES = (16, 256)
"""weft's own, and the smallest that FlashAttention 2 takes."""
HEADS = ((8, 4), (8, 1), (2, 7), (4, 8))
"""Key heads, and query heads for each."""


@dataclass(frozen=True)
class Workload:
    """Rows of a step; ``tokens`` new ones and ``context`` in total of each of ``prompts`` rows, beside ``decoding``."""

    decoding: int
    prompts: int
    tokens: int
    context: int

    @property
    def lens(self) -> tuple[list[int], list[int]]:
        """New tokens and tokens in total by row."""
        new = [1] * self.decoding + [self.tokens] * self.prompts
        return new, [self.context] * len(new)


def workloads(shape: Shape) -> Iterator[Workload]:
    """Rows that decode, prompts, their later chunks, and both; short ones first."""
    if shape.name == "tiny":
        yield from (Workload(2, 0, 0, 40), Workload(1, 1, 9, 20))
        return
    for context, rows in itertools.product((512, 4096), (1, 8, 64, 256)):
        yield Workload(rows, 0, 0, context)
    yield from (Workload(0, 1, 512, 512), Workload(0, 4, 512, 2048), Workload(32, 1, 512, 1024))


def measure(share: Share, device: torch.device, *, models: Sequence[str], rounds: int, seed: int) -> dict[str, Any]:
    """What is wrong by how much, and seconds of one layer by backend and workload."""
    backends, absent = present(device)
    for name, why in absent.items():
        print(f"  {name} is not there: {why}", flush=True)
    timed = _time(share.part(0.6), device, backends, models)
    return {"absent": absent, **check(share, device, backends, rounds=rounds, seed=seed), "attention": timed}


def check(share: Share, device: torch.device, backends: Sequence[Backend], *, rounds: int, seed: int) -> dict[str, Any]:
    """Rounds of one random layer for each backend and dtype, as far as it is fit for it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    failures: list[dict[str, str]] = []
    for turn, backend, dtype in itertools.product(range(rounds), backends, DTYPES):
        if share.over:
            share.skip(f"attention: checks from round {turn + 1}, {backend.name} {dtype} on")
            break
        key = f"{seed}/{turn}/attention by {backend.name}/{dtype}"
        layer, case = draw(random.Random(key), DTYPES[dtype], small=device.type == "cpu")
        if backend.unfit(layer, DTYPES[dtype], case.rows.page_size) is not None:
            continue
        limit = TOLERANCES[DTYPES[dtype]][0]
        try:
            error = error_of(backend, layer, case, device)
            problem = None if error <= limit else f"{error:.2e} is beyond {limit:.0e}, with {layer}"
        except Exception as failed:  # of the next ones one wants to know as well
            error, problem = math.nan, f"{type(failed).__name__}: {failed}, with {layer}"
        if problem is not None:
            failures.append({"case": key, "problem": problem})
        mine = found.setdefault(f"attention by {backend.name}", {})
        figures = mine.setdefault(dtype, {"cases": 0, "largest_error": 0.0, "tolerance": limit})
        figures["cases"] += 1
        figures["largest_error"] = error if error != error else max(figures["largest_error"], error)
    return {"kernels": found, "failures": failures}


def draw(rng: random.Random, dtype: torch.dtype, *, small: bool) -> tuple[Layer, AttentionCase]:
    """A layer as models have them, and random rows."""
    kv_heads, group = (2, rng.choice((1, 2))) if small else rng.choice(HEADS)
    width = 16 if small else rng.choice((64, 80, 96, 128, 256))
    window, softcap = rng.choice((None, None, rng.randint(1, 100))), rng.choice((None, None, 30.0))
    most, longest = (3, 60) if small else (rng.choice((1, 8, 64)), rng.choice((64, 600, 3000)))
    rows = rng.randint(1, most)
    decoding = rng.random() < 0.5
    new = [1 if decoding else rng.choice((1, rng.randint(1, 20 if small else 300))) for _ in range(rows)]
    case = random_attention(
        new,
        [count + rng.randint(0, longest) for count in new],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=width,
        page_size=rng.choice(PAGES),
        dtype=dtype,
        seed=rng.randrange(1 << 31),
    )
    return Layer(kv_heads * group, kv_heads, width, width, window, softcap, False), case


def error_of(backend: Backend, layer: Layer, case: AttentionCase, device: torch.device) -> float:
    """The relative error. The reference is computed afterwards: its memory must not hold the result beforehand."""
    args = moved((case.q, case.k_cache, case.v_cache, case.rows), device)
    options = {"scale": layer.head_dim**-0.5, "window": layer.window, "softcap": layer.softcap}
    actual = backend.attend(*args, **options)
    wide = widened(args)
    with in_double():
        expected = reference.paged_attention(*wide, **options)
    return relative_error(actual, expected)


def _time(
    share: Share, device: torch.device, backends: Sequence[Backend], models: Sequence[str]
) -> list[dict[str, Any]]:
    watch = Stopwatch(device)
    copy = watch.copy_bandwidth()
    shapes = {(s.heads, s.kv_heads, s.head_dim): s for s in (SHAPES[name] for name in reversed(models))}
    todo = [(shape, pages, each) for shape in shapes.values() for pages in PAGES for each in workloads(shape)]
    found = []
    for done, (shape, pages, workload) in enumerate(todo):
        if share.over:
            share.skip(f"attention: {len(todo) - done} of {len(todo)} workloads")
            break
        found.append({"model": shape.name, "page_size": pages, **asdict(workload)})
        found[-1]["backends"] = _figures(shape, pages, workload, watch, copy, backends, device)
    return found


def _figures(
    shape: Shape,
    pages: int,
    workload: Workload,
    watch: Stopwatch,
    copy: float,
    backends: Sequence[Backend],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Seconds of a layer by backend, and its bytes a second as a share of a copy's."""
    dtype = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    layer = Layer(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, None, None, False)
    case = on_device(layer, pages, workload, dtype, device)
    tokens, keys = len(case.q), sum(case.rows.total_lens)
    nbytes = 2 * dtype.itemsize * shape.head_dim * (tokens * shape.heads + keys * shape.kv_heads)
    figures: dict[str, dict[str, Any]] = {}
    for backend in backends:
        unfit = backend.unfit(layer, dtype, pages)
        if unfit is not None:
            figures[backend.name] = {"unfit": unfit}
            continue
        try:
            seconds = watch.median(
                lambda each=backend: each.attend(
                    case.q, case.k_cache, case.v_cache, case.rows, scale=shape.head_dim**-0.5
                )
            )
        except Exception as failed:  # whatever a library does not find
            figures[backend.name] = {"failed": f"{type(failed).__name__}: {failed}"[:300]}
            continue
        figures[backend.name] = {"seconds": seconds, "share": nbytes / seconds / copy}
    return figures


def on_device(layer: Layer, pages: int, workload: Workload, dtype: torch.dtype, device: torch.device) -> AttentionCase:
    """Normal keys and values made on the device, the rows' pages in random order."""
    new, totals = workload.lens
    each = -(-workload.context // pages)
    tables = np.random.default_rng(0).permutation(each * len(new)).reshape(len(new), each).tolist()
    rows = AttentionRows.build(new, totals, tables, pages, device)
    size = (each * len(new), pages, layer.kv_heads, layer.head_dim)
    k_cache, v_cache = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(sum(new), layer.heads, layer.head_dim, dtype=dtype, device=device)
    return AttentionCase(q, k_cache, v_cache, rows)
