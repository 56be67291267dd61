"""Serving under load: throughput, time to first token, inter-token latency.

    python benchmarks/bench_serving.py                      the demo, offline and through a server started for it
    python benchmarks/bench_serving.py --url URL …          a live server; options as of `weft bench`
    python benchmarks/bench_serving.py --offline …          the engine in this process; options as of `weft bench`

The workloads are those of Punica (four patterns of popularity), Zipf, and S-LoRA's trace (power law, Gamma arrivals)
scaled down to the demo. Equal seeds give equal requests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.server.bench import report
from weft.server.bench.live import LiveTarget
from weft.server.bench.offline import OfflineTarget
from weft.server.bench.run import Target, measure
from weft.server.bench.workload import Workload
from weft.server.cli.bench import bench
from weft.server.demo import demo_adapters
from weft.server.settings import Settings

RESULT = Path(__file__).parent / "results" / "serving-demo.json"
START_SECONDS = 300
LOAD = Workload(concurrency=16, prompt_tokens=(8, 64), output_tokens=(8, 64))
BASE_ALONE = "base alone"
WORKLOADS = {
    BASE_ALONE: replace(LOAD, popularity="identical"),
    "punica distinct": replace(LOAD, popularity="distinct"),
    "punica uniform": replace(LOAD, popularity="uniform"),
    "punica skewed": replace(LOAD, popularity="skewed"),
    "punica identical": replace(LOAD, popularity="identical"),
    "zipf 1.0": replace(LOAD, popularity="zipf", alpha=1.0),
    "s-lora 4/s": replace(LOAD, popularity="power", alpha=0.1, rate=4.0, cv=1.0),
}


def suite(
    requests: Annotated[int, typer.Option(help="Per workload.")] = 64,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal requests.")] = 0,
    out: Annotated[Path, typer.Option(help="Write the figures, machine and versions there as JSON.")] = RESULT,
) -> None:
    """Run every workload on the demo, offline and live. With --url or --offline: one, as `weft bench --help` says."""
    workloads = {name: replace(load, num_requests=requests, seed=seed) for name, load in WORKLOADS.items()}
    runs: dict[str, dict[str, Any]] = {}
    with closing(OfflineTarget(Settings.load().engine_config(), demo_adapters())) as offline:
        runs.update(run_all("offline", offline, workloads))
    with demo_server() as url:
        runs.update(run_all("live", LiveTarget(url), workloads))
    report.write(out, {**report.environment(sys.argv), "runs": runs})
    typer.echo(report.table({name: run["results"] for name, run in runs.items()}))
    if any(run["results"]["completed"] < requests for run in runs.values()):
        raise typer.Exit(1)


def run_all(mode: str, target: Target, workloads: dict[str, Workload]) -> dict[str, dict[str, Any]]:
    """Every workload on one target, by name; a short one first, which is not counted, to warm it up."""
    measure(target, replace(LOAD, num_requests=8), [*target.adapters, target.base])
    runs = {}
    for name, workload in workloads.items():
        typer.echo(f"{mode}: {name}", err=True)
        runs[f"{mode}, {name}"] = measure(target, workload, [target.base] if name == BASE_ALONE else target.adapters)
    return runs


@contextmanager
def demo_server(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A `weft serve` of the demo, or of what ``arguments`` name, on a free port in a process of its own; its URL."""
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "weft.server.cli", "serve", "--port", "0", "--state-dir", folder]
        log = Path(folder) / "stdout"
        with log.open("w") as out:
            process = subprocess.Popen([*command, "--log-level", "warning", *arguments], stdout=out, env=variables)
        try:
            yield _url(process, log)
        finally:
            process.terminate()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The server's address, once it has printed it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"^weft serves .* on (http://\S+)$", log.read_text(), re.MULTILINE):
            return match[1]
        time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    one_target = any(argument.split("=")[0] in {"--url", "--offline"} for argument in sys.argv[1:])
    typer.run(bench if one_target else suite)
