"""Few-shot composition: weights found from five examples, against the best single adapter and the uniform average.

    python benchmarks/lorahub.py

A *desk* gets requests of two kinds, each of which another adapter of the demo was trained for: no single adapter
answers both. There is a desk for every pair of the demo's seven tasks. LoRAHub's search weighs the seven LoRAs of the
demo from five training examples of the desk; every figure is exact match on held-out examples, greedy, all weightings
in one mixed batch. It prints the table of docs/benchmarks.md and writes `benchmarks/results/lorahub-demo.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, cast

from weft.adapters.composition import Combination
from weft.adapters.search import OPTIMIZERS, SearchSettings, Weights, find_weights
from weft.server import LLM, SamplingParams
from weft.server.bench import report
from weft.server.demo import demo_adapters, demo_model
from weft.server.demo.tasks import TASKS, held_out
from weft.server.demo.tasks.task import Example

RESULT = Path(__file__).parent / "results" / "lorahub-demo.json"
SHOTS = 5
DESKS = tuple(combinations(TASKS, 2))


@dataclass(frozen=True)
class Row:
    """Held-out exact match on one desk, 0 to 1.

    Attributes:
        single: of the best single adapter, ``best``. uniform: of all candidates at one over their number.
        weights: those found, by candidate. loss: on the examples. seconds: that the search took.
    """

    desk: str
    base: float
    best: str
    single: float
    uniform: float
    fitted: float
    weights: dict[str, float]
    loss: float
    seconds: float


def few(desk: Sequence[str]) -> list[Example]:
    """Training examples of a desk's kinds in turn; none is among the held-out ones."""
    rng = Random("+".join(desk))
    kinds = [islice(TASKS[kind].pairs("train", rng), SHOTS) for kind in desk]
    examples = [[TASKS[kind].example(pair) for pair in pairs] for kind, pairs in zip(desk, kinds, strict=True)]
    return list(chain.from_iterable(zip(*examples, strict=True)))[:SHOTS]


class Bench:
    """The demo's base with the candidates."""

    def __init__(self, candidates: Sequence[str], combination: Combination) -> None:
        self.candidates = list(candidates)
        self.combination = combination
        adapters = {id: str(demo_adapters()[id]) for id in candidates}
        self.llm = LLM(str(demo_model()), adapters=adapters, dtype="float32", max_num_seqs=64)

    def losses(self, candidates: Sequence[Weights], examples: Sequence[Example]) -> list[float]:
        """Of each weighting the mean over the examples of the completion's cross entropy, as the server scores it."""
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None
        end = self.llm.info.eos_token_ids[0]
        prompts, lengths = [], []
        for example in examples:
            completion = [*tokenizer.encode(example.completion, add_special_tokens=False), end]
            prompts.append([*tokenizer.encode(example.prompt, add_special_tokens=True), *completion])
            lengths.append(len(completion))
        outputs = self.llm.generate(
            prompts * len(candidates),
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
            adapter=[self.weights(weights) for weights in candidates for _ in examples],
            combination=self.combination,
        )
        scored = []
        for output, length in zip(outputs, lengths * len(candidates), strict=True):
            assert output.prompt_logprobs is not None
            scored.append(-sum(entry.logprob for entry in output.prompt_logprobs[-length:] if entry) / length)
        size = len(examples)
        return [sum(scored[at : at + size]) / size for at in range(0, len(scored), size)]

    def weights(self, weights: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.candidates, weights, strict=True))

    def accuracies(self, runs: Sequence[Any], examples: Sequence[Example]) -> list[float]:
        """Exact match of each of ``runs`` (what ``LLM.generate`` takes as ``adapter``), all in one mixed batch."""
        outputs = self.llm.generate(
            [example.prompt for _ in runs for example in examples],
            SamplingParams(temperature=0, max_tokens=64),
            adapter=[run for run in runs for _ in examples],
            combination=self.combination,
        )
        right = [
            output.outputs[0].text.strip() == example.completion.strip()
            for output, example in zip(outputs, [*examples] * len(runs), strict=True)
        ]
        size = len(examples)
        return [sum(right[at : at + size]) / size for at in range(0, len(right), size)]

    def row(self, desk: Sequence[str], count: int, skip: int, settings: SearchSettings) -> Row:
        shots = few(desk)
        started = time.perf_counter()
        found, trials = find_weights(len(self.candidates), lambda round: self.losses(round, shots), settings)
        seconds = time.perf_counter() - started
        loss = next((t.loss for t in trials if t.weights == found), None) or self.losses([found], shots)[0]
        each = count // len(desk)
        asked = [example for kind in desk for example in held_out(TASKS[kind], skip + each)[skip:]]
        uniform = self.weights([1 / len(self.candidates)] * len(self.candidates))
        base, average, fitted, *singles = self.accuracies([None, uniform, self.weights(found), *self.candidates], asked)
        best = max(range(len(singles)), key=singles.__getitem__)
        name = " + ".join(desk)
        return Row(
            name, base, self.candidates[best], singles[best], average, fitted, self.weights(found), loss, seconds
        )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| desk | base | best single adapter | uniform average | found from 5 examples | weights |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        weights = ", ".join(f"{id} {weight:.2f}" for id, weight in row.weights.items() if abs(weight) >= 0.005)
        single = f"{row.single:.1%} (`{row.best}`)"
        lines.append(
            f"| {row.desk} | {row.base:.1%} | {single} | {row.uniform:.1%} | **{row.fitted:.1%}** | {weights} |"
        )
    return "\n".join([*lines, *summary(rows)])


def summary(rows: Sequence[Row]) -> list[str]:
    """The mean over all rows, as a row of the table, and how often the weights found win."""
    if len(rows) < 2:
        return []
    means = [f"{mean(getattr(row, name) for row in rows):.1%}" for name in ("base", "single", "uniform", "fitted")]
    won = sum(row.fitted > max(row.single, row.uniform) for row in rows)
    *others, fitted = means
    return [f"| mean | {' | '.join(others)} | **{fitted}** | ahead of both on {won} of {len(rows)} |"]


def main() -> None:
    """Search, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="held-out examples of every desk")
    parser.add_argument("--skip", type=int, default=60, help="held-out examples of every task to leave out before them")
    parser.add_argument("--candidates", nargs="+", default=list(TASKS), help="ids of LoRAs of the demo")
    parser.add_argument("--desk", help="one desk alone: sql+classify")
    parser.add_argument("--combination", choices=("linear", "lorahub"), default="linear")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=SearchSettings.optimizer)
    parser.add_argument("--budget", type=int, default=SearchSettings.budget)
    parser.add_argument("--seed", type=int, default=SearchSettings.seed)
    parser.add_argument("--round-size", type=int, default=SearchSettings.round_size)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    settings = SearchSettings(given.budget, given.seed, given.optimizer, round_size=given.round_size)
    bench = Bench(given.candidates, cast(Combination, given.combination))
    desks = [tuple(given.desk.split("+"))] if given.desk else DESKS
    rows = []
    for desk in desks:
        rows.append(bench.row(desk, given.count, given.skip, settings))
        last = table(rows[-1:]).splitlines()[-1]
        print(last, f"loss {rows[-1].loss:.4f} after {rows[-1].seconds:.0f} s", file=sys.stderr)
    print(table(rows))
    content = {
        **report.environment(sys.argv),
        "combination": given.combination,
        "search": asdict(settings),
        "count": given.count,
        "skip": given.skip,
        "candidates": given.candidates,
        "desks": [asdict(row) for row in rows],
    }
    given.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
