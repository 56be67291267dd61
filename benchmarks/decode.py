"""How fast a CPU or a GPU decodes and prefills, base alone and with adapters, and where a step's time goes.

    python benchmarks/decode.py                   a random Llama of 125M parameters in bf16, 32 rows, 64 in, 64 out
    python benchmarks/decode.py --prompt 512 --threads 2
    python benchmarks/decode.py --breakdown       a table of operators as well

The model and the adapters, of all linears and saved by peft, are random and made here. Rounds on the base and on
adapters take turns and the medians are compared, because a machine has other things to do; the processor's own time,
which others cannot take, is printed beside them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams

VOCAB = 32_000


@dataclass
class Times:
    """Seconds by the clock and of the processor.

    Attributes:
        prefill: of the steps until every row had its first token, by round.
        steps: in which all rows decode.
        first: until a row had its first token, since its round began.
    """

    prefill: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def main(
    rows: Annotated[int, typer.Option(help="That decode together.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 64,
    output: Annotated[int, typer.Option(help="Tokens that every row generates.")] = 64,
    adapters: Annotated[int, typer.Option(help="Distinct adapters of a mixed round.")] = 8,
    rank: Annotated[int, typer.Option(help="Of every adapter.")] = 16,
    rounds: Annotated[int, typer.Option(help="Of the base and mixed, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="Of torch; 0: as many as it chooses.")] = 0,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 12,
    dtype: Annotated[str, typer.Option(help="Of the base and the adapters.")] = "bfloat16",
    breakdown: Annotated[bool, typer.Option(help="Print the operators of a decoding step.")] = False,
) -> None:
    """Print tokens per second of prefill and decoding, and milliseconds of their steps."""
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        base, saved = make(Path(folder), layers, adapters, rank)
        config = EngineConfig(str(base), dtype=dtype, max_adapters=max(1, adapters), max_num_seqs=rows)
        with closing(Engine(config)) as engine:
            for name, path in saved.items():
                engine.register_adapter(name, path)
            kinds: dict[str, list[str | None]] = {"base": [None], "mixed": [*saved] or [None]}
            times = {kind: Times() for kind in kinds}
            for turn in range(rounds + 1):
                for kind, chosen in kinds.items():
                    # The first round warms up: it fills slots and caches.
                    run(engine, chosen, rows, prompt, output, seed=turn, times=times[kind] if turn else Times())
            for kind, measured in times.items():
                report(kind, measured, rows, prompt)
            compare(times["base"], times["mixed"])
            for kind, chosen in kinds.items() if breakdown else ():
                typer.echo(f"\n{kind}, operators of a decoding step")
                typer.echo(operators(engine, chosen, rows, prompt))


def make(folder: Path, layers: int, adapters: int, rank: int) -> tuple[Path, dict[str, Path]]:
    """A random base model and random adapters of all its linears, saved."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=768,
            num_hidden_layers=layers,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
            vocab_size=VOCAB,
        )
    ).bfloat16()
    model.save_pretrained(str(folder / "base"))
    options = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, options)
    saved = {}
    for index in range(adapters):
        torch.manual_seed(index)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        saved[f"adapter-{index}"] = folder / f"adapter-{index}"
        wrapped.save_pretrained(str(saved[f"adapter-{index}"]))
    return folder / "base", saved


def start(engine: Engine, adapters: list[str | None], rows: int, prompt: int, output: int, seed: int) -> None:
    """Add the requests of a round, with prompts of their own, once their adapters are there."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for name in adapters:  # so that no row waits for its adapter in what is measured
        engine.add(EngineRequest(f"load-{name}", [3], SamplingParams(max_tokens=1), adapter=name))
    while engine.has_work:
        if not engine.step():
            engine.wait(0.02)
    for row in range(rows):
        ids = rng.integers(3, VOCAB, prompt).tolist()
        name = adapters[row % len(adapters)]
        engine.add(EngineRequest(f"row-{row}", ids, params, adapter=name, cache_salt=f"{time.monotonic_ns()}"))


def run(
    engine: Engine, adapters: list[str | None], rows: int, prompt: int, output: int, *, seed: int, times: Times
) -> None:
    """One round, written to ``times``."""
    start(engine, adapters, rows, prompt, output, seed)
    began, worked = time.perf_counter(), time.process_time()
    started: set[str] = set()
    while len(started) < rows:
        arrived = {delta.request_id for delta in engine.step()} - started
        times.first += [time.perf_counter() - began] * len(arrived)
        started |= arrived
    times.prefill.append((time.perf_counter() - began, time.process_time() - worked))
    while engine.has_work:
        began, worked = time.perf_counter(), time.process_time()
        if len(engine.step()) == rows:
            times.steps.append((time.perf_counter() - began, time.process_time() - worked))


def report(kind: str, times: Times, rows: int, prompt: int) -> None:
    """Print the medians of one kind of round."""
    prefill, prefill_work = middle(times.prefill)
    typer.echo(
        f"{kind:6} prefill {rows * prompt / prefill:8.0f} tok/s   {prefill * 1e3:8.1f} ms   processor "
        f"{prefill_work * 1e3:8.1f} ms   first token, median {statistics.median(times.first) * 1e3:8.1f} ms"
    )
    if times.steps:
        step, work = middle(times.steps)
        best = min(seconds for seconds, _ in times.steps)
        typer.echo(
            f"{kind:6} decode  {rows / step:8.0f} tok/s   {step * 1e3:8.1f} ms   processor {work * 1e3:8.1f} ms   "
            f"best step {best * 1e3:8.1f} ms   n {len(times.steps)}"
        )


def middle(times: list[tuple[float, float]]) -> tuple[float, float]:
    """The medians of both clocks."""
    by_clock, of_processor = zip(*times, strict=True)
    return statistics.median(by_clock), statistics.median(of_processor)


def compare(base: Times, mixed: Times) -> None:
    """Print what share of the base's speed the mixed rounds have."""
    for what, one, other in (("prefill", base.prefill, mixed.prefill), ("decode", base.steps, mixed.steps)):
        if one and other:
            seconds, work = (a / b for a, b in zip(middle(one), middle(other), strict=True))
            typer.echo(f"mixed / base, {what}: {seconds:.3f} by the clock, {work:.3f} by the processor's time")


def operators(engine: Engine, adapters: list[str | None], rows: int, prompt: int, steps: int = 5) -> str:
    """A table of the operators that take most of the time of decoding steps."""
    start(engine, adapters, rows, prompt, steps + 3, seed=0)
    waiting = rows
    while waiting > 0:
        waiting -= len(engine.step())
    engine.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            engine.step()
    while engine.has_work:
        engine.step()
    return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


if __name__ == "__main__":
    typer.run(main)
