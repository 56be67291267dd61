"""What composing adapters for a request costs: the decode time of composed rows, and the weighting step.

    python benchmarks/composition.py                        the demo's base, with random adapters of one rank
    python benchmarks/composition.py --model PATH --rank 16 --members 10 --rows 32

A row on a LoRAHub mixture and a row on a plain adapter have the same rank, so that their steps do the same work. Rounds
of the two take turns, and the medians are compared, because a machine has other things to do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from weft.adapters.composition import Composition, Member
from weft.server.config import EngineConfig
from weft.server.demo import demo_model
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams

Rows = Callable[[int], EngineRequest]
"""The request of a row."""

PROMPT = list(range(3, 19))


def main(
    model: Annotated[str, typer.Option(help="Folder or hub id of the base; default: the demo's.")] = "",
    rank: Annotated[int, typer.Option(help="Of every adapter.")] = 8,
    members: Annotated[int, typer.Option(help="Adapters, all of which every composition is made of.")] = 10,
    rows: Annotated[int, typer.Option(help="Of a batch; each on another adapter or weighting.")] = 16,
    steps: Annotated[int, typer.Option(help="Decoding steps of a round.")] = 40,
    rounds: Annotated[int, typer.Option(help="Of each of the two.")] = 5,
    weightings: Annotated[int, typer.Option(help="Weighting steps to time.")] = 50,
    dtype: Annotated[str, typer.Option(help="Of the base and the adapters.")] = "auto",
) -> None:
    """Print the milliseconds of a decoding step and of a weighting step."""
    with tempfile.TemporaryDirectory() as folder:
        base = model or str(demo_model())
        adapters = random_adapters(base, Path(folder), rank, max(members, rows))
        config = EngineConfig(base, dtype=dtype, max_adapters=2 * max(members, rows) + 2, max_num_seqs=rows)
        with closing(Engine(config)) as engine:
            for name, path in adapters.items():
                engine.register_adapter(name, path)
            compare(engine, list(adapters), members, rows, steps, rounds)
            report("weighting step", [compose(engine, list(adapters)[:members], seed) for seed in range(weightings)])


def random_adapters(base: str, folder: Path, rank: int, count: int) -> dict[str, Path]:
    """LoRA adapters of all linears, saved by peft."""
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    saved = {}
    for index in range(count):
        torch.manual_seed(index)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        saved[f"adapter-{index}"] = folder / f"adapter-{index}"
        wrapped.save_pretrained(str(saved[f"adapter-{index}"]))
    return saved


def weighted(names: Sequence[str], seed: int) -> Composition:
    """Weights as LoRAHub draws them."""
    weights = np.random.default_rng(seed).uniform(-1.5, 1.5, len(names)) / len(names)
    return Composition(tuple(Member(n, float(w)) for n, w in zip(names, weights, strict=True)), "lorahub")


def compare(engine: Engine, names: list[str], members: int, rows: int, steps: int, rounds: int) -> None:
    """Decode on plain adapters and on compositions, in turn."""
    params = SamplingParams(max_tokens=steps + 2, temperature=0.0, ignore_eos=True)

    def plain(row: int) -> EngineRequest:
        return EngineRequest(f"{time.monotonic_ns()}", PROMPT, params, adapter=names[row])

    def composed(row: int) -> EngineRequest:
        return EngineRequest(f"{time.monotonic_ns()}", PROMPT, params, composition=weighted(names[:members], row))

    kinds: dict[str, Rows] = {"plain": plain, "composed": composed}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, request in kinds.items():
            measured = decode(engine, [request(row) for row in range(rows)], steps)
            if turn:  # the first fills the slots
                seconds[kind] += measured
    for kind, times in seconds.items():
        report(f"decoding step, {kind}", times)
    ratio = statistics.median(seconds["composed"]) / statistics.median(seconds["plain"])
    typer.echo(f"composed / plain, medians: {ratio:.3f}")


def decode(engine: Engine, requests: Sequence[EngineRequest], steps: int) -> list[float]:
    """Seconds of each step in which all rows decode."""
    started = set()
    for request in requests:
        engine.add(request)
    while len(started) < len(requests):
        started.update(delta.request_id for delta in engine.step())
    times = []
    for _ in range(steps // 2):  # until the first row of all ends
        began = time.perf_counter()
        count = len(engine.step())
        if count == len(requests):
            times.append(time.perf_counter() - began)
    while engine.has_work:
        engine.step()
    return times


def compose(engine: Engine, names: list[str], seed: int) -> float:
    """Seconds of the weighting step of a new composition."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    engine.add(EngineRequest(f"new-{seed}", PROMPT, params, composition=weighted(names, 10_000 + seed)))
    told: list[float | None] = []
    while engine.has_work:
        deltas = engine.step()
        told += [delta.compose_seconds for delta in deltas]
        if not deltas:  # as the server does: whoever asks again and again keeps the loader from working
            engine.wait(0.02)
    (seconds,) = (each for each in told if each is not None)
    return seconds


def report(what: str, seconds: Sequence[float]) -> None:
    """Print the median and the spread."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    typer.echo(f"{what:28} median {middle:7.2f} ms   p10 {low:7.2f}   p90 {high:7.2f}   n {len(seconds)}")


if __name__ == "__main__":
    typer.run(main)
