"""Section 4: decode steps of real models' shapes with random weights: how much of the ideal ratio is reached."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu.budget import Share
from gpu.shapes import SHAPES, Shape, ideal_ratio, ranks_of, spread
from gpu.timing import Stopwatch
from weft.adapters.base import Base
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.layout import Layout, Placement
from weft.adapters.overlap import overlap_for
from weft.adapters.parts import LowRank
from weft.adapters.side_sites import attach_side
from weft.adapters.sites import attach_sites
from weft.adapters.slots import SlotPool
from weft.server.config import EngineConfig
from weft.server.engine import attention, selfcheck
from weft.server.engine.attention_backends import attention_for
from weft.server.engine.batch import Batch
from weft.server.engine.graphs import GraphRunner, capture_for
from weft.server.engine.kv_cache import KVCache
from weft.server.engine.model import ModelRunner
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.scheduler import Row
from weft.server.engine.sequence import Sequence as Stream
from weft.server.engine.side import SideNetworks

BATCHES = (1, 8, 32, 64, 128, 256)
PAGE = 16
# (adapters, rank; None: mixed), those of equal rank together: they share what is in the slots.
SETS = ((0, 16), (1, 16), (8, 16), (64, 16), (8, 64), (64, 64), (8, None), (64, None))


@dataclass(frozen=True)
class Rig:
    """A model with random weights on the device, its caches and slots.

    Attributes:
        graphs: None on a CPU.
    """

    shape: Shape
    runner: ModelRunner
    pool: SlotPool
    base: Base
    graphs: GraphRunner | None


def build(shape: Shape, device: torch.device, *, rows: int, context: int, adapters: int, rank: int) -> Rig:
    """Room for so many rows of ``context`` tokens, and for adapters of a rank on every linear."""
    dtype = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    config = AutoConfig.for_model(shape.model_type, **shape.config())
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.eval().requires_grad_(False)
    attention.register()
    layers = selfcheck.attention_layers(model)
    shapes = [layer.cache_shape for layer in layers]
    model.set_attn_implementation(attention.NAME)
    pages = rows * -(-(context + 1) // PAGE)
    cache = KVCache(shapes, num_blocks=pages, block_size=PAGE, dtype=dtype, device=device)
    for tensor in (*cache.keys, *cache.values):  # figures on zeros are too good
        tensor.normal_()
    base = Base.of(model)
    widths = sum(site.in_features + site.out_features for site in base.sites.values())
    memory = int(1.1 * adapters * rank * widths * dtype.itemsize)
    pool = SlotPool(base, num_slots=adapters, memory=memory, dtype=dtype, device=device)
    sites = attach_sites(model, base, pool)
    side = SideNetworks(
        base, pool, cache, memory=0, active=attach_side(model, base, pool), embed=model.get_input_embeddings()
    )
    attend = attention_for(EngineConfig("", block_size=PAGE), layers, dtype, device, context + 1)
    runner = ModelRunner(model, cache, sites, side, device, attend)
    capture = capture_for(device)
    sizes = {"max_rows": rows, "max_len": context + 1, "vocab": shape.vocab}
    paths, graphs = frozenset(base.sites), None
    if capture is not None:
        graphs = GraphRunner(runner, pool, paths, **sizes, capture=capture, overlap=overlap_for(device))
    return Rig(shape, runner, pool, base, graphs)


def occupy(rig: Rig, ranks: Sequence[int]) -> list[Placement]:
    """Put an adapter of each rank into slots 0, 1, …, on every linear of the layers."""
    made = {rank: _adapter(rig, rank) for rank in set(ranks)}
    placements = []
    for rank in ranks:
        placement = rig.pool.reserve(Layout.of(made[rank]))
        assert placement is not None, "the pool was made for this many"
        rig.pool.upload(placement, made[rank])
        rig.pool.publish(placement)
        placements.append(placement)
    return placements


def _adapter(rig: Rig, rank: int) -> CompiledAdapter:
    """Random and small, of the linears that an adapter of all linears has: not the head."""
    like: dict[str, Any] = {"device": rig.runner.device, "dtype": rig.pool.dtype}
    sites = {
        path: SiteForms(
            LowRank(
                torch.randn(rank, site.in_features, **like) * site.in_features**-0.5,
                torch.randn(site.out_features, rank, **like) * 0.01,
            )
        )
        for path, site in rig.base.sites.items()
        if path != rig.base.head
    }
    return CompiledAdapter(f"random {rank}", "LORA", sites)


def rows_of(rig: Rig, slots: Sequence[int], context: int) -> list[Row]:
    """Rows that decode the token behind ``context`` others."""
    pages = -(-(context + 1) // PAGE)
    rows = []
    for index, slot in enumerate(slots):
        ids = [(7 * index + at) % rig.shape.vocab for at in range(context + 1)]
        stream = Stream.start(EngineRequest(f"row {index}", ids, SamplingParams(max_tokens=1)), b"", context + 2)
        stream.blocks, stream.slot = list(range(index * pages, (index + 1) * pages)), slot
        rows.append(Row(stream, context, context + 1))
    return rows


def measure(
    share: Share, device: torch.device, *, models: Sequence[str], batches: Sequence[int], context: int
) -> dict[str, Any]:
    """Milliseconds of a step for every model, batch, set of adapters and mode."""
    watch = Stopwatch(device)
    copy = watch.copy_bandwidth()
    found: dict[str, Any] = {}
    for index, name in enumerate(models):
        part = share.part(1 / (len(models) - index))
        if part.over:
            share.skip(f"decode: all of {name}")
            continue
        found[name] = _model(part, SHAPES[name], device, batches, context, copy)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "context": context,
        "copy_bytes_per_second": copy,
        "step": "rows to tensors, forward pass, the most likely token, and waiting for it",
        "models": found,
    }


def _model(
    share: Share, shape: Shape, device: torch.device, batches: Sequence[int], context: int, copy: float
) -> dict[str, Any]:
    small = shape.name == "tiny"
    most = 8 if small else 64
    rig = build(shape, device, rows=max(batches), context=context, adapters=most, rank=64)
    steps: list[dict[str, Any]] = []
    modes = ("graphs", "eager") if rig.graphs is not None else ("eager",)
    occupied: list[Placement] = []
    for rank, group in itertools.groupby(SETS, key=lambda each: each[1]):
        sets = [count for count, _ in group if count <= most]
        for placement in occupied:
            rig.pool.free(placement)
        occupied = []
        if share.over:
            share.skip(f"decode of {shape.name}: adapters of rank {rank or 'mixed'} and all after")
            break
        for count in sets:  # the base is timed before any adapter is there
            if count and not occupied:
                occupied = occupy(rig, ranks_of(most, rank))
            steps += _set(share, rig, batches, context, count, rank, modes)
    idle = (
        [_step(rig, batch, context, [-1] * batch, mode) for batch, mode in _idle(share, batches, modes)]
        if occupied
        else []
    )
    _add_ratios(steps, shape, context, copy)
    return {"steps": steps, "base_with_idle_adapters": idle, "graphs_failed": rig.graphs.failed if rig.graphs else None}


def _idle(share: Share, batches: Sequence[int], modes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What is left to time with adapters in all slots that no row asks for."""
    for batch, mode in itertools.product(batches, modes):
        if share.over:
            share.skip(f"base rows beside idle adapters, from batch {batch} {mode} on")
            return
        yield batch, mode


def _set(
    share: Share, rig: Rig, batches: Sequence[int], context: int, count: int, rank: int | None, modes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for batch, mode in itertools.product(batches, modes):
        if count > batch:
            continue
        if share.over:
            share.skip(f"decode of {rig.shape.name}: {count} adapters of rank {rank or 'mixed'}, from batch {batch} on")
            return
        figures = _step(rig, batch, context, spread(batch, count), mode)
        yield {**figures, "adapters": count, "rank": rank, "ranks": ranks_of(count, rank)}


def _step(rig: Rig, batch: int, context: int, slots: Sequence[int], mode: str) -> dict[str, Any]:
    """The median of some steps, in seconds."""
    rows = rows_of(rig, slots, context)

    def step() -> None:
        built = Batch.build(rows, PAGE, rig.runner.device)
        captured = mode == "graphs" and rig.graphs is not None and rig.graphs.serves(built)
        logits = rig.graphs.forward(built) if captured and rig.graphs is not None else rig.runner.forward(built)
        logits.argmax(-1).tolist()

    return {"batch": batch, "mode": mode, "seconds": median_of(step)}


def median_of(step: Callable[[], None], warm: int = 3, repeats: int = 12) -> float:
    """Wall time of steps that wait for their result."""
    for _ in range(warm):
        step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _add_ratios(steps: list[dict[str, Any]], shape: Shape, context: int, copy: float) -> None:
    """R_measured against the base's step of the same batch and mode, R_ideal, and the base's share of the roofline."""
    base = {(each["batch"], each["mode"]): each["seconds"] for each in steps if not each["adapters"]}
    for each in steps:
        roofline = (shape.weight_bytes + shape.kv_bytes(each["batch"] * context)) / copy
        ranks = each.pop("ranks")
        if not each["adapters"]:
            each["roofline_seconds"], each["share_of_roofline"] = roofline, roofline / each["seconds"]
        elif (each["batch"], each["mode"]) in base:
            each["r_measured"] = base[each["batch"], each["mode"]] / each["seconds"]
            each["r_ideal"] = ideal_ratio(shape, each["batch"], context, ranks)
            each["measured_of_ideal"] = each["r_measured"] / each["r_ideal"]
