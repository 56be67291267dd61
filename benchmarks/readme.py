"""Writes the tables of ``benchmarks/README.md`` from the figures in ``results/``, so that the two never disagree.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.report import METRICS, THROUGHPUT, least, measured, ratios

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results"
PEERS = RESULTS / "peers-cpu.json"
PARTIAL = RESULTS / "peers-cpu-partial.json"
"""Of whoever measures some cases only, and is not kept."""
COMMAND = "make bench-peers"
# What depends on the machine, and is given by make.
OMITTED = ("--vllm-python", "--llama-python", "--out")
SYSTEMS = ("weft", "weft-http", "vllm", "peft", "transformers", "llama.cpp")
Report = Mapping[str, Any]


def fill(readme: Path = README, results: Path = RESULTS) -> None:
    """Write all sections anew."""
    text = readme.read_text()
    for name, render in SECTIONS.items():
        section = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if not section.search(text):
            raise SystemExit(f"{readme} has no section <!-- {name} -->")
        rendered = render(results)
        text = section.sub(lambda _, rendered=rendered: rendered, text)
    readme.write_text(text)


def peers_of(results: Path) -> list[Report]:
    """The runs beside peers that there are, those of most repetitions first, then the newest."""
    found = [json.loads(path.read_text()) for path in results.glob("peers-cpu*.json") if path.name != PARTIAL.name]
    return sorted(found, key=lambda report: (report["repeat"], report["date"]), reverse=True)


def targets(reports: Sequence[Report]) -> str:
    """A row for each target, of the first of the runs that measured it."""
    rows = [
        "| target | at least | measured | ours | theirs | verdict | run | command |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    every = [ratios(report["cases"]) for report in reports]
    for index, row in enumerate(ratios([])):
        number, row = next(((n, each[index]) for n, each in enumerate(every, 1) if each[index]["ratio"]), (0, row))
        run, command = (str(number), _command(reports[number - 1]["command"])) if number else ("", COMMAND)
        rows.append(_row([row["target"], least(row), *measured(row), run, f"`{command}`"]))
    return "\n".join([*_places(reports), *rows]) + "\n"


def cases(reports: Sequence[Report]) -> str:
    """A row for each case that was measured: output tokens per second, medians."""
    rows = [_row(["case", *SYSTEMS, "weft over vLLM", "over PEFT", "run"]), _row(["---"] * (len(SYSTEMS) + 4))]
    seen: set[str] = set()
    for number, report in enumerate(reports, 1):
        for case in report["cases"]:
            if case["name"] not in seen:
                seen.add(case["name"])
                figures = (case["figures"].get(system) for system in SYSTEMS)
                throughputs = ("" if each is None else f"{each[THROUGHPUT]['median']:.0f}" for each in figures)
                rows.append(_row([case["name"], *throughputs, _over(case, "vllm"), _over(case, "peft"), str(number)]))
    return "\n".join(rows if seen else ["Not measured."]) + "\n"


def latencies(reports: Sequence[Report]) -> str:
    """A row for each system of each case in which requests arrive one by one."""
    rows = [_row(["case", "system", "TTFT p50, ms", "p99", "ITL p50, ms", "p99", "run"]), _row(["---"] * 7)]
    seen: set[str] = set()
    for number, report in enumerate(reports, 1):
        for case in report["cases"]:
            if case["role"] == "load" and case["name"] not in seen:
                seen.add(case["name"])
                for system, figures in case["figures"].items():
                    told = (figures[name]["median"] for name in METRICS[1:])
                    rows.append(_row([case["name"], system, *(f"{value:.0f}" for value in told), str(number)]))
    return "\n".join(rows if seen else ["Not measured."]) + "\n"


def scale(results: Path) -> str:
    """Many adapters, and loads beside decoding."""
    report = _report(results / "scale-cpu.json")
    told = [] if report is None else [report["many_to_few"], report["storm_to_quiet_itl_p99"]]
    registered, hot = ("2000", "100") if report is None else (str(report["registered"]), str(report["hot"]))
    asked = (
        (f"{registered} registered, {hot} hot by Zipf: throughput over that with 5", "at least 0.95", 0.95, True),
        ("ITL p99 beside a storm of loads over that without", "at most 1.2", 1.2, False),
    )
    rows = [_row(["target", "", "measured", "verdict", "command"]), _row(["---"] * 5)]
    command = "python benchmarks/scale.py" if report is None else _typed(report["command"])
    for index, (text, bound, value, more) in enumerate(asked):
        cells = ["not measured", ""]
        if told:
            middle = statistics.median(told[index])
            cells = [_spread(told[index]), "met" if (middle >= value if more else middle <= value) else "missed"]
        rows.append(_row([text, bound, *cells, f"`{command}`"]))
    return "\n".join([*([] if report is None else [_where(report) + ".", ""]), *rows]) + "\n"


def startup(results: Path) -> str:
    """Loading beside reading, and memory."""
    report = _report(results / "startup-cpu.json")
    command = "python benchmarks/startup.py" if report is None else _typed(report["command"])
    rows = [_row(["what", "measured", "command"]), _row(["---"] * 3)]
    figures = {"loading over reading the files": [], "memory of its own over the weights": []}
    if report is not None:
        figures["loading over reading the files"] = [run["seconds"] / run["read_seconds"] for run in report["runs"]]
        figures["memory of its own over the weights"] = [run["RssAnon"] / report["bytes"] for run in report["runs"]]
    for what, values in figures.items():
        rows.append(_row([what, _spread(values) if values else "not measured", f"`{command}`"]))
    if report is None:
        return "\n".join(rows) + "\n"
    size, reading = report["bytes"], statistics.median(run["read_seconds"] for run in report["runs"])
    loading = statistics.median(run["seconds"] for run in report["runs"])
    told = f"{size / 1e9:.1f} GB are read in {reading:.1f} s and loaded in {loading:.1f} s."
    return "\n".join([f"{_where(report)}. {told}", "", *rows]) + "\n"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "peers-cpu": lambda results: targets(peers_of(results)),
    "peers-cpu-cases": lambda results: cases(peers_of(results)),
    "peers-cpu-latencies": lambda results: latencies(peers_of(results)),
    "scale-cpu": scale,
    "startup-cpu": startup,
}


def _report(path: Path) -> Report | None:
    return json.loads(path.read_text()) if path.exists() else None


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _over(case: Mapping[str, Any], system: str) -> str:
    """What weft's throughput is in a system's, each in the same repetition."""
    runs = case["runs"]
    if "weft" not in runs or system not in runs:
        return ""
    pairs = zip(runs["weft"], runs[system], strict=True)
    return _spread([ours[THROUGHPUT] / theirs[THROUGHPUT] for ours, theirs in pairs])


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def _typed(command: str) -> str:
    """A program of this folder as it was called, without where its figures went."""
    words = iter(shlex.split(command))
    kept = [word for word in words if not (word in OMITTED and next(words))]
    return f"python benchmarks/{shlex.join(kept)}"


def _command(typed: str) -> str:
    """The target of make that does the same as the program that was called."""
    words = iter(shlex.split(typed)[1:])
    kept = [word for word in words if not (word in OMITTED and next(words))]
    return f'{COMMAND} ARGS="{shlex.join(kept)}"' if kept else COMMAND


def _places(reports: Sequence[Report]) -> Iterator[str]:
    """Where and when the figures of each run were measured."""
    for number, report in enumerate(reports, 1):
        versions = dict(report["versions"])
        for about in (about for systems in report["systems"].values() for about in systems.values()):
            versions = about["versions"] | versions
        named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
        times = "1 repetition" if report["repeat"] == 1 else f"{report['repeat']} repetitions"
        yield f"Run {number}: {_where(report)}, {report['threads']} threads, {times}: {named}."
        yield ""


def _where(report: Report) -> str:
    return f"{report['date'][:10]}, {report['device']['cpu']}, commit `{str(report['commit'])[:12]}`"


if __name__ == "__main__":
    fill()
