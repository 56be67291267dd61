"""What proxy-tuning costs: a decode step of a batch of proxy requests beside the same rows on each model alone.

    python benchmarks/proxy.py [--rows 32] [--size 512 --small-size 256 …]

Both models have random weights. The expert is the small model with a LoRA, the anti-expert the small model; their rows
ride in one batch, in both measurements. Rounds of the three measurements alternate, and medians are compared, so that a
machine that changes its speed changes all of them.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from weft.server.bench import report
from weft.server.config import EngineConfig
from weft.server.engine.arithmetic import LogitArithmetic, proxy
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams

PROMPT = 32
WARM_STEPS = 3
BOUND = 1.10


def main(
    rows: Annotated[int, typer.Option(help="Requests in the batch.")] = 32,
    steps: Annotated[int, typer.Option(help="Decode steps of a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Of every measurement, in turn.")] = 7,
    size: Annotated[int, typer.Option(help="Hidden size of the main model, of 64 to a head.")] = 768,
    layers: Annotated[int, typer.Option(help="Of the main model.")] = 12,
    small_size: Annotated[int, typer.Option(help="Hidden size of the small model.")] = 384,
    small_layers: Annotated[int, typer.Option(help="Of the small model.")] = 6,
    vocab: Annotated[int, typer.Option(help="Of both.")] = 32000,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures, machine and versions there as JSON.")] = None,
) -> None:
    """Measure, print a line for each, and fail if the proxy batch costs more than its models and 10%."""
    settings = {"dtype": dtype, "max_num_seqs": 2 * rows, "max_num_batched_tokens": 2 * rows * PROMPT}
    with tempfile.TemporaryDirectory() as folder:
        large = save_model(Path(folder, "large"), size, layers, vocab)
        small = save_model(Path(folder, "small"), small_size, small_layers, vocab)
        expert = save_lora(small, Path(folder, "expert"))
        both = Engine(EngineConfig(str(large), proxy_models=(("small", str(small)),), max_model_len=512, **settings))
        alone = Engine(EngineConfig(str(small), max_model_len=512, **settings))
        both.register_adapter("expert", expert, "small")
        alone.register_adapter("expert", expert)
        arithmetic = proxy(expert=("small", "expert"), anti_expert=("small", None), alpha=1.0)
        runs: dict[str, Callable[[], float]] = {
            "main model alone": lambda: decode(both, [(None, None)] * rows, steps),
            "small model alone, expert and anti-expert": lambda: decode(
                alone, [("expert", None), (None, None)] * rows, steps
            ),
            "proxy batch": lambda: decode(both, [(None, arithmetic)] * rows, steps),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run())
    conclude(seconds, rows, out)


def conclude(seconds: dict[str, list[float]], rows: int, out: Path | None) -> None:
    """Print and write what was measured."""
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    *models, _ = medians.values()
    # Of the same round, and so of the same minute.
    ratio = statistics.median(p / (a + b) for a, b, p in zip(*seconds.values(), strict=True))
    for name, median in medians.items():
        typer.echo(f"{name:45} {1e3 * median:8.1f} ms a step")
    typer.echo(f"{'models, one after the other':45} {1e3 * sum(models):8.1f} ms a step")
    typer.echo(f"proxy batch of {rows} costs {ratio:.3f} of its models (bound: {BOUND})")
    if out is not None:
        report.write(out, {**report.environment(sys.argv), "seconds": seconds, "ratio": ratio})
    if ratio > BOUND:
        raise typer.Exit(1)


def decode(engine: Engine, asked: list[tuple[str | None, LogitArithmetic | None]], steps: int) -> float:
    """Median seconds of a step in which every request gets a token."""
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=WARM_STEPS + 2 * steps, ignore_eos=True)
    for i, (adapter, arithmetic) in enumerate(asked):
        prompt = [rng.randrange(3, 1000) for _ in range(PROMPT)]
        engine.add(EngineRequest(f"r{i}", prompt, params, adapter, adapter, arithmetic=arithmetic))
    warm = 0
    while warm < WARM_STEPS:
        deltas = engine.step()
        warm = warm + 1 if len(deltas) == len(asked) else 0
        if not deltas:
            engine.wait(0.05)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        deltas = engine.step()
        times.append(time.perf_counter() - started)
        assert len(deltas) == len(asked), "every request is decoding"
    for i in range(len(asked)):
        engine.abort(f"r{i}")
    engine.step()
    return statistics.median(times)


def save_model(folder: Path, size: int, layers: int, vocab: int) -> Path:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size,
        intermediate_size=size * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_lora(base: Path, folder: Path) -> Path:
    """A LoRA of rank 16 on all linears, which changes the answers."""
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    typer.run(main)
