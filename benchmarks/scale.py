"""What many adapters cost those who use few: thousands registered, and loads beside decoding.

    python benchmarks/scale.py                          the demo's base, 2000 random LoRA adapters of rank 8
    python benchmarks/scale.py --model PATH --registered 2000 --hot 100 --slots 128

Two engines take turns, so that a machine that has other things to do slows both. *Few* has 5 adapters registered;
*many* has all of them, of which the requests of a run ask for the ``hot`` ones by Zipf's law. Then, on the second,
what a load storm does to others: the same arrivals twice, where every other request is for an adapter that has to be
loaded first, and where it is for one that is there already.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from composition import random_adapters
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from weft.server.bench import report
from weft.server.bench.measure import StepAdapters, Trace, summarise
from weft.server.bench.offline import OfflineTarget
from weft.server.bench.workload import Arrival, Workload
from weft.server.config import EngineConfig
from weft.server.demo import demo_model

RESULT = Path(__file__).parent / "results" / "scale-cpu.json"
FEW = 5
ADAPTER_FILE = "adapter_model.safetensors"


def main(
    model: Annotated[str, typer.Option(help="Folder or hub id of the base; default: the demo's.")] = "",
    registered: Annotated[int, typer.Option(help="Adapters of the second engine.")] = 2000,
    hot: Annotated[int, typer.Option(help="Of them, that requests ask for.")] = 100,
    slots: Annotated[int, typer.Option(help="Adapters on the device at once.")] = 128,
    rank: Annotated[int, typer.Option(help="Of every adapter.")] = 8,
    rows: Annotated[int, typer.Option(help="Requests at a time.")] = 32,
    requests: Annotated[int, typer.Option(help="Of a run.")] = 128,
    rate: Annotated[float, typer.Option(help="Requests per second in the load storm.")] = 4.0,
    repeat: Annotated[int, typer.Option(help="Runs of each kind.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the base and the adapters.")] = "auto",
    out: Annotated[Path, typer.Option(help="Write the figures there as JSON.")] = RESULT,
) -> None:
    """Measure, print the tables, write the figures."""
    base = model or str(demo_model())
    config = EngineConfig(base, dtype=dtype, max_adapters=slots, max_num_seqs=rows)
    with tempfile.TemporaryDirectory() as folder:
        adapters = many_adapters(base, Path(folder), rank, registered)
        few_adapters = dict(list(adapters.items())[:FEW])
        with closing(OfflineTarget(config, few_adapters)) as few:
            began = time.perf_counter()
            with closing(OfflineTarget(config, adapters)) as many:
                seconds = time.perf_counter() - began
                load = Workload(requests, "zipf", 1.0, concurrency=rows, prompt_tokens=(8, 64), output_tokens=(32, 96))
                figures = throughput(few, many, list(adapters)[:hot], load, repeat)
                figures |= storm(many, list(adapters)[:FEW], list(adapters)[hot:], replace(load, rate=rate), repeat)
    figures["register_seconds"] = seconds
    show(figures, registered, hot)
    report.write(out, {**report.environment(sys.argv), "registered": registered, "hot": hot, **figures})


def many_adapters(base: str, folder: Path, rank: int, count: int) -> dict[str, Path]:
    """One adapter as peft saves it, and ``count`` - 1 like it with other numbers."""
    (name, first), *_ = random_adapters(base, folder, rank, 1).items()
    tensors = load_file(first / ADAPTER_FILE)
    made = {name: first}
    for index in range(1, count):
        copy = folder / f"adapter-{index}"
        shutil.copytree(first, copy, ignore=shutil.ignore_patterns(ADAPTER_FILE))
        torch.manual_seed(index)
        save_file({key: torch.randn_like(tensor) * 0.02 for key, tensor in tensors.items()}, copy / ADAPTER_FILE)
        made[copy.name] = copy
    return made


def throughput(few: OfflineTarget, many: OfflineTarget, hot: list[str], load: Workload, repeat: int) -> dict[str, Any]:
    """Output tokens per second of both, and the ratio of neighbouring runs."""
    told: dict[str, list[float]] = {"few": [], "many": []}
    for turn in range(repeat + 1):
        for name, target, models in (("few", few, few.adapters), ("many", many, hot)):
            result = run(target, replace(load, seed=turn).sample(models), load.concurrency)
            if turn:  # the first loads what is hot
                told[name].append(result["output_tokens_per_s"])
    ratios = [b / a for a, b in zip(told["few"], told["many"], strict=True)]
    return {"output_tokens_per_s": told, "many_to_few": ratios}


def storm(target: OfflineTarget, warm: list[str], cold: list[str], load: Workload, repeat: int) -> dict[str, Any]:
    """Latencies of requests for ``warm`` adapters, in milliseconds, where the others' are ``warm`` or ``cold`` too."""
    told: dict[str, list[dict[str, Any]]] = {"quiet": [], "storm": [], "loaded": []}
    unused = iter(cold * (1 + load.num_requests * repeat // max(1, len(cold))))
    for turn in range(repeat):
        quiet = replace(load, seed=turn).sample(warm)
        storms = [replace(a, model=next(unused)) if index % 2 else a for index, a in enumerate(quiet)]
        for name, arrivals in (("quiet", quiet), ("storm", storms)):
            traces = checked(target.run(arrivals, None)[0])
            told[name].append(summarise(traces[::2], StepAdapters()))
            if name == "storm":
                told["loaded"].append(summarise(traces[1::2], StepAdapters()))
    ratios = [b["itl_ms"]["p99"] / a["itl_ms"]["p99"] for a, b in zip(told["quiet"], told["storm"], strict=True)]
    return {"load_storm": told, "storm_to_quiet_itl_p99": ratios}


def run(target: OfflineTarget, arrivals: list[Arrival], concurrency: int) -> dict[str, Any]:
    """The figures of one run in which nothing fails."""
    traces, step_adapters = target.run(arrivals, concurrency)
    return summarise(checked(traces), step_adapters)


def checked(traces: list[Trace]) -> list[Trace]:
    """``traces``. Raises ``RuntimeError`` where a request failed."""
    for trace in traces:
        if trace.error is not None:
            raise RuntimeError(trace.error)
    return traces


def show(figures: dict[str, Any], registered: int, hot: int) -> None:
    """The medians as a table."""
    table = Table("what", "median", "of each run", title=f"{registered} adapters, {hot} of them hot")
    told, storms = figures["output_tokens_per_s"], figures["load_storm"]
    rows = {
        f"{FEW} registered, output tok/s": told["few"],
        "all registered, output tok/s": told["many"],
        "all / few": figures["many_to_few"],
        "ITL p99 without loads, ms": [each["itl_ms"]["p99"] for each in storms["quiet"]],
        "ITL p99 beside loads, ms": [each["itl_ms"]["p99"] for each in storms["storm"]],
        "ITL p99, beside / without": figures["storm_to_quiet_itl_p99"],
        "TTFT p50 without loads, ms": [each["ttft_ms"]["p50"] for each in storms["quiet"]],
        "TTFT p50 beside loads, ms": [each["ttft_ms"]["p50"] for each in storms["storm"]],
        "TTFT p50 of those that load, ms": [each["ttft_ms"]["p50"] for each in storms["loaded"]],
        "registering all, s": [figures["register_seconds"]],
    }
    for what, values in rows.items():
        table.add_row(what, f"{median(values):.3f}", ", ".join(f"{value:.3f}" for value in values))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    typer.run(main)
