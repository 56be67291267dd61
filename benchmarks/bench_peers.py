"""weft beside its peers on a CPU, vLLM, PEFT, transformers and llama.cpp: one machine, one run, the same loads.

    make bench-peers                               everything; writes results/peers-cpu.json and the README's table
    make bench-peers ARGS="--quick"                a few cases, small: does it run here, and how do they compare?
    make bench-peers ARGS="--peers weft,peft"      some systems only

Every system runs in a process of its own and stays up while its set of adapters is measured; jobs are given to one at a
time, in turn, so that the machine's drift falls on all of them. Before anything is timed, all answer the same requests
in fp32, and their tokens are compared. llama.cpp has to be compiled: where that failed it is left out, unless
``--peers`` names it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` and PYTHONSAFEPATH leave it out

import readme
from peers import report
from peers.materials import LLAMA_125M, Materials, Workshop, llama
from peers.plan import QUICK, SYSTEMS, AdapterSet, Case, Size, mixed, plan, sets
from peers.systems import BASE as BASE_NAME
from peers.systems import PYTHONS, Answer, PeerFailure, Running, start
from peers.worker import Setup
from rich.console import Console

from weft.server.bench import report as serving_report
from weft.server.bench.measure import StepAdapters, summarise
from weft.server.bench.workload import Arrival

CHECKED = ("weft", "vllm", "peft", "llama.cpp")
ORACLE = "peft"
OPTIONAL = {"llama.cpp"}
"""Left out where they are not installed."""
console = Console(width=160)


def main(
    peers: Annotated[str | None, typer.Option(help=f"Systems, of {','.join(SYSTEMS)}; default: all.")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="Of every case; default: 3, 1 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few, small cases.")] = False,
    rate: Annotated[float, typer.Option(help="Arrivals per second of the loads; all systems should keep up.")] = 2.0,
    cases: Annotated[str, typer.Option(help="Regular expression: only cases in whose names it is found.")] = "",
    shape: Annotated[str, typer.Option(help="Of the random Llama: hidden:layers:heads:MLP:vocabulary.")] = LLAMA_125M,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every system; default: all cores.")] = None,
    vllm_python: Annotated[Path, typer.Option(help="Of vLLM's environment.")] = PYTHONS["vllm"],
    llama_python: Annotated[Path, typer.Option(help="Of llama.cpp's environment.")] = PYTHONS["llama.cpp"],
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go; by default whole runs fill the README.")
    ] = None,
) -> None:
    """Measure weft and its peers side by side."""
    pythons = {"vllm": vllm_python, "llama.cpp": llama_python}
    systems = choose(peers, pythons)
    size = replace(QUICK if quick else Size(), rate=rate)
    chosen = [case for case in plan(size) if re.search(cases, case.name)]
    if "weft-http" not in systems:
        chosen = [case for case in chosen if case.role != "http"]
    if not chosen:
        raise typer.BadParameter(f"no case has {cases!r} in its name")
    cores = sorted(os.sched_getaffinity(0))
    threads = threads or len(cores)
    os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    result: dict[str, Any] = {**serving_report.environment(sys.argv), "threads": threads}
    result |= {"repeat": repeat or (1 if quick else 3), "size": asdict(size)}
    with tempfile.TemporaryDirectory() as folder:
        workshop, rows = Workshop(Path(folder), llama(shape)), max(size.rows, size.http_streams)
        bench = Bench(workshop, systems, threads, pythons, rows)
        result["agreement"] = bench.agreement()
        result["cases"] = bench.run(chosen, result["repeat"])
    result |= {"ratios": report.ratios(result["cases"]), "systems": bench.about, "failures": bench.failures}
    whole = not quick and set(systems) >= set(SYSTEMS) - OPTIONAL and not cases and shape == LLAMA_125M
    serving_report.write(out or (readme.PEERS if whole else readme.PARTIAL), result)
    if out is None and whole:  # what is in the README is what is in the result beside it
        readme.fill()
    show(result)
    if bench.failures or not agrees(result["agreement"]):
        raise typer.Exit(1)


def choose(peers: str | None, pythons: Mapping[str, Path]) -> tuple[str, ...]:
    """The systems that ``peers`` names; without it all, but for those of ``OPTIONAL`` that are not installed.

    Raises:
        typer.BadParameter: there is no such system, or it is not installed.
    """
    systems = SYSTEMS if peers is None else tuple(peers.split(","))
    if unknown := set(systems) - set(SYSTEMS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    for system in [s for s in systems if s in pythons and not pythons[s].exists()]:
        missing = f"{system} is not at {pythons[system]}: `make bench-peers` installs it"
        if peers is not None or system not in OPTIONAL:
            raise typer.BadParameter(f"{missing}; or leave out {system}")
        console.print(f"WITHOUT {missing}, and says what failed", style="bold", markup=False)
        systems = tuple(s for s in systems if s != system)
    return systems


def show(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    console.print(report.figures_table(result["cases"]))
    console.print(report.ratios_table(result["ratios"]))
    for system, found in result["agreement"].items():
        console.print(f"fp32 tokens as {ORACLE}'s: {system}, {found['equal']} of {found['rows']} requests to the end")
    for what, message in result["failures"].items():
        console.print(f"FAILED {what}: {message}", markup=False)


def agrees(agreement: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether everybody began every answer alike; later on, ties are broken by rounding."""
    return all(found["first_equal"] == found["rows"] for found in agreement.values())


class Bench:
    """The systems, and what went wrong with them; ``about`` has their versions and settings by set of adapters.

    A system that fails takes no further part in the cases of the set it failed in.
    """

    def __init__(
        self,
        workshop: Workshop,
        systems: Sequence[str],
        threads: int,
        pythons: Mapping[str, Path],
        max_num_seqs: int,
    ) -> None:
        self._workshop, self._systems = workshop, systems
        self._threads, self._pythons, self._max_num_seqs = threads, pythons, max_num_seqs
        self.about: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}

    def agreement(self) -> dict[str, dict[str, int]]:
        """How many requests, over adapters of three ranks and the base, each system answers as ``ORACLE`` does."""
        checked = [system for system in CHECKED if system in self._systems]
        case = Case(mixed(3), True, 32, 16, 8, 8, systems=tuple(checked))
        materials = self._workshop.of(case.adapters)
        answers: dict[str, list[Answer]] = {}
        arrivals = case.workload(materials.vocab_size, seed=0).sample([*materials.adapters, BASE_NAME])
        with self._up(case.adapters, materials, [case], "float32") as running:
            for system in list(running):
                if done := self._job(running, system, case, arrivals):
                    answers[system] = done
        if ORACLE not in answers:
            return {}
        return {s: _compare(done, answers[ORACLE]) for s, done in answers.items() if s != ORACLE}

    def run(self, cases: Sequence[Case], repeat: int) -> list[dict[str, Any]]:
        """Every case ``repeat`` times."""
        reports = []
        for adapters in sets(cases):
            mine = [case for case in cases if case.adapters == adapters and self._taking_part(case)]
            materials = self._workshop.of(adapters)
            with self._up(adapters, materials, mine, "bfloat16") as running:
                for case, runs in self._measure(running, materials, mine, repeat).items():
                    if any(runs.values()):
                        reports.append(report.case_report(case, {s: done for s, done in runs.items() if done}))
        return reports

    def _measure(
        self, running: dict[str, Running], materials: Materials, cases: Sequence[Case], repeat: int
    ) -> dict[Case, dict[str, list[dict[str, Any]]]]:
        """The runs of each case by system; the order of the systems turns round from one repetition to the next."""
        runs: dict[Case, dict[str, list[dict[str, Any]]]] = {case: {} for case in cases}
        for turn in range(-1, repeat):  # the first warms up
            for number, case in enumerate(cases):
                names = list(materials.adapters) if case.mixed else [BASE_NAME]
                shape = case if turn >= 0 else case.warm_up()
                arrivals = shape.workload(materials.vocab_size, seed=1 + number + (turn + 1) * len(cases)).sample(names)
                for system in self._taking_part(case)[:: -1 if turn % 2 else 1]:
                    answers = self._job(running, system, shape, arrivals)
                    if answers and turn >= 0:
                        summary = summarise([answer.trace for answer in answers], StepAdapters())
                        runs[case].setdefault(system, []).append(summary)
                        rate = summary[report.THROUGHPUT]
                        console.print(f"{case.name}, {turn + 1} of {repeat}: {system} {rate:.1f} tok/s", style="dim")
        return {case: {s: of[s] for s in case.systems if s in of} for case, of in runs.items()}

    def _taking_part(self, case: Case) -> list[str]:
        return [system for system in case.systems if system in self._systems]

    def _job(
        self, running: dict[str, Running], system: str, case: Case, arrivals: Sequence[Arrival]
    ) -> list[Answer] | None:
        """The answers; None if the system has failed, now or before."""
        if system not in running:
            return None
        try:
            answers = running[system].run(arrivals, case.streams if case.rate is None else None)
            if errors := {answer.trace.error for answer in answers if answer.trace.error}:
                raise PeerFailure("; ".join(sorted(errors)))
        except PeerFailure as failure:
            self.failures[f"{system}, {case.name}"] = str(failure)
            running.pop(system).close()
            return None
        return answers

    @contextmanager
    def _up(
        self, adapters: AdapterSet, materials: Materials, cases: Sequence[Case], dtype: str
    ) -> Iterator[dict[str, Running]]:
        """The systems that take part in ``cases``, by name, while they are up."""
        setup = Setup(
            str(materials.model),
            {name: str(folder) for name, folder in materials.adapters.items()},
            materials.ranks,
            self._max_num_seqs,
            max((case.prompt_tokens + case.output_tokens for case in cases), default=1),
            dtype,
            self._threads,
        )
        running: dict[str, Running] = {}
        try:
            for system in dict.fromkeys(s for case in cases for s in self._taking_part(case)):
                console.print(f"{adapters.name}: starting {system}", style="dim")
                try:
                    running[system] = start(system, setup, self._pythons)
                except PeerFailure as failure:
                    self.failures[f"{system}, {adapters.name}"] = str(failure)
                else:
                    self.about.setdefault(adapters.name, {})[system] = running[system].about
            yield running
        finally:
            for system in running.values():
                system.close()


def _compare(answers: Sequence[Answer], oracle: Sequence[Answer]) -> dict[str, int]:
    pairs = list(zip(answers, oracle, strict=True))
    return {
        "rows": len(pairs),
        "first_equal": sum(a.tokens[0] == b.tokens[0] for a, b in pairs),
        "equal": sum(a.tokens == b.tokens for a, b in pairs),
    }


if __name__ == "__main__":
    typer.run(main)
