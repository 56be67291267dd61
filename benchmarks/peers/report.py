"""What the runs come to: figures of each case, ratios for the targets, and tables of both."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from peers.plan import BASE, TARGET, AdapterSet, Case, Role

THROUGHPUT = "output_tokens_per_s"
METRICS = (THROUGHPUT, "ttft_ms.p50", "ttft_ms.p99", "itl_ms.p50", "itl_ms.p99")
"""Figures of a run (``measure.summarise``) that are tabulated."""
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    """One figure: of a system, in the shortest case of this description."""

    system: str
    adapters: AdapterSet
    mixed: bool
    role: Role = "burst"


@dataclass(frozen=True)
class Target:
    """``ours`` over ``theirs`` must be ``least`` or more, if it is set; where less is better, theirs over ours."""

    text: str
    least: float | None
    ours: Side
    theirs: Side
    metric: str = THROUGHPUT

    @property
    def unit(self) -> str:
        return "tok/s" if self.metric == THROUGHPUT else "ms"


def _targets() -> Iterator[Target]:
    base = Side("weft", BASE, False)
    mixed, own = Side("weft", TARGET, True), Side("weft", TARGET, False)
    yield Target("base: throughput over vLLM's", 1.2, base, Side("vllm", BASE, False))
    yield Target("8 adapters of rank 16: mixed throughput over weft's own base", 0.8, mixed, own)
    for system, name in (("vllm", "vLLM"), ("peft", "PEFT")):
        yield Target(f"8 adapters of rank 16: throughput over {name}'s", 4.0, mixed, Side(system, TARGET, True))
    for system, name in (("vllm", "vLLM"), ("peft", "PEFT")):
        for share in ("p50", "p99"):
            sides = Side("weft", TARGET, True, "load"), Side(system, TARGET, True, "load")
            yield Target(f"under load: {name}'s TTFT {share} over weft's", 1.0, *sides, metric=f"ttft_ms.{share}")
    for adapters, name in ((False, "base"), (True, "8 adapters of rank 16")):
        sides = Side("weft-http", TARGET, adapters, "http"), Side("weft", TARGET, adapters, "http")
        yield Target(f"{name}: throughput over HTTP over the offline engine's", 0.95, *sides)
    further = "llama.cpp"
    yield Target(f"base: throughput over {further}'s", None, base, Side(further, BASE, False))
    yield Target(f"8 adapters of rank 16: throughput over {further}'s", None, mixed, Side(further, TARGET, True))


TARGETS = tuple(_targets())


def figure(run: Run, metric: str) -> float:
    """One figure of a run; ``metric`` may be a path, "ttft_ms.p50".

    Raises:
        ValueError: the run has none, because nothing came of it.
    """
    value: Any = run
    for part in metric.split("."):
        value = value[part]
    if value is None:
        raise ValueError(f"a run without {metric}: {run['error_messages']}")
    return float(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def case_report(case: Case, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """A case, its runs in their order, and the spread of each figure over them."""
    return {
        "name": case.name,
        "adapters": case.adapters.name,
        "ranks": list(case.adapters.ranks),
        "model": case.adapters.model,
        "mixed": case.mixed,
        "role": case.role,
        "rate": case.rate,
        "streams": case.streams,
        "requests": case.requests,
        "prompt_tokens": case.prompt_tokens,
        "output_tokens": case.output_tokens,
        "figures": {
            system: {metric: spread([figure(run, metric) for run in repeated]) for metric in METRICS}
            for system, repeated in runs.items()
        },
        "runs": {system: list(repeated) for system, repeated in runs.items()},
    }


def ratios(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target with its ratio; those that were not measured have none.

    Ratios are of the same repetition, which ran next to each other, so that the machine's drift cancels.
    """
    return [_ratio(target, cases) for target in TARGETS]


def _ratio(target: Target, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"target": target.text, "least": target.least, "unit": target.unit, "ratio": None}
    ours, theirs = _values(target.ours, target.metric, cases), _values(target.theirs, target.metric, cases)
    if not ours or len(ours) != len(theirs):
        return row
    pairs = list(zip(ours, theirs, strict=True))
    less_is_better = target.metric != THROUGHPUT
    row["ratio"] = spread([b / a if less_is_better else a / b for a, b in pairs])
    row["ours"], row["theirs"] = statistics.median(ours), statistics.median(theirs)
    row["met"] = None if target.least is None else row["ratio"]["median"] >= target.least
    return row


def _values(side: Side, metric: str, cases: Sequence[Mapping[str, Any]]) -> list[float]:
    """The figure in each repetition; empty where it was not measured."""
    for case in cases:
        here = (case["adapters"], case["mixed"], case["role"])
        if here == (side.adapters.name, side.mixed, side.role) and side.system in case["runs"]:
            return [figure(run, metric) for run in case["runs"][side.system]]
    return []


def figures_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each case and system: medians, and the spread and ratio of the throughput."""
    table = Table("case", "system", "tok/s", "low to high", "weft over it", "TTFT p50", "p99 ms", "ITL p50", "p99 ms")
    for case in cases:
        ours = [figure(run, THROUGHPUT) for run in case["runs"].get("weft", [])]
        for number, (system, figures) in enumerate(case["figures"].items()):
            throughput = figures[THROUGHPUT]
            theirs = [figure(run, THROUGHPUT) for run in case["runs"][system]]
            over = [a / b for a, b in zip(ours, theirs, strict=False)]
            table.add_row(
                "" if number else case["name"],
                system,
                f"{throughput['median']:.1f}",
                f"{throughput['low']:.1f} to {throughput['high']:.1f}",
                "" if system == "weft" or not over else f"{statistics.median(over):.2f}",
                *(f"{figures[metric]['median']:.1f}" for metric in METRICS[1:]),
                end_section=number == len(case["figures"]) - 1,
            )
    return table


def ratios_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each target."""
    table = Table("target", "at least", "measured", "ours", "theirs", "")
    for row in rows:
        table.add_row(row["target"], least(row), *measured(row))
    return table


def least(row: Mapping[str, Any]) -> str:
    """What a target asks for, as text; nothing of a further peer."""
    return "" if row["least"] is None else f"{row['least']:g}"


def measured(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The ratio with its spread, both sides and the verdict of a target, as text."""
    if row["ratio"] is None:
        return "not measured", "", "", ""
    ratio = row["ratio"]
    sides = (f"{row[side]:.1f} {row['unit']}" for side in ("ours", "theirs"))
    spread_text = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return spread_text, *sides, {True: "met", False: "missed", None: ""}[row["met"]]
