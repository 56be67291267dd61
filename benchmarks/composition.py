"""What composing adapters for a request costs: the decode time of composed rows, and the weighting step.

    python benchmarks/composition.py                        the demo's base, with random adapters of one rank
    python benchmarks/composition.py --model PATH --rank 16 --members 10 --rows 32

A row on a LoRAHub mixture and a row on a plain adapter have the same rank, so that their steps do the same work. Two
engines take turns, step by step, one with plain rows and one with composed ones, and what is told is the median of the
ratios of neighbouring steps: a machine that has other things to do slows both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
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
        with closing(Engine(config)) as plain, closing(Engine(config)) as composed:
            for engine in (plain, composed):
                for name, path in adapters.items():
                    engine.register_adapter(name, path)
            compare(plain, composed, list(adapters), members, rows, steps, rounds)
            names = list(adapters)[:members]
            report("weighting step", [compose(composed, names, seed) for seed in range(weightings)])


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


def compare(
    plain: Engine, composed: Engine, names: list[str], members: int, rows: int, steps: int, rounds: int
) -> None:
    """Decode on plain adapters and on compositions, step by step in turn."""
    params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
    pairs: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        for row in range(rows):
            plain.add(EngineRequest(f"{turn}-{row}", PROMPT, params, adapter=names[row]))
            composed.add(EngineRequest(f"{turn}-{row}", PROMPT, params, composition=weighted(names[:members], row)))
        start(plain, rows)
        start(composed, rows)
        measured = [(timed(plain, rows), timed(composed, rows)) for _ in range(steps // 2)]
        if turn:  # the first fills the slots
            pairs += measured
        for engine in (plain, composed):
            while engine.has_work:
                engine.step()
    report("decoding step, plain", [pair[0] for pair in pairs])
    report("decoding step, composed", [pair[1] for pair in pairs])
    low, middle, high = np.percentile([of_composed / of_plain for of_plain, of_composed in pairs], [25, 50, 75])
    typer.echo(f"composed / plain: median {middle:.3f}, middle half {low:.3f} to {high:.3f}")


def start(engine: Engine, rows: int) -> None:
    """Step until every row decodes."""
    started: set[str] = set()
    while len(started) < rows:
        started.update(delta.request_id for delta in engine.step())


def timed(engine: Engine, rows: int) -> float:
    """Seconds of a step in which all rows decode."""
    began = time.perf_counter()
    deltas = engine.step()
    seconds = time.perf_counter() - began
    if len(deltas) != rows:
        raise RuntimeError(f"{len(deltas)} of {rows} rows decoded")
    return seconds


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
