"""Starts and drives the systems: each is a process of its own, and only the one that is being measured has work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bench_serving import demo_server

from peers.worker import Setup
from weft.server.bench.live import LiveTarget
from weft.server.bench.measure import Trace
from weft.server.bench.workload import Arrival

BENCHMARKS = Path(__file__).resolve().parent.parent
PYTHONS = {
    "vllm": BENCHMARKS.parent / ".venv-vllm" / "bin" / "python",
    "llama.cpp": BENCHMARKS.parent / ".venv-llama" / "bin" / "python",
}
"""Of the systems with an environment of their own."""
START_SECONDS = 900
JOB_SECONDS = 1800
KV_CACHE_GIB = 4
BASE = "base"
"""What requests for the base are called in traces."""
MODULES = {
    "weft": "weft_worker",
    "vllm": "vllm_worker",
    "peft": "peft_worker",
    "transformers": "transformers_worker",
    "llama.cpp": "llama_worker",
}


class PeerFailure(Exception):
    """A system did not start or did not do its job; the message has the end of its log."""


@dataclass(frozen=True)
class Answer:
    """What came of one request: its times, and its tokens where the system tells them."""

    trace: Trace
    tokens: list[int]


class Running(Protocol):
    """A system that is up."""

    @property
    def about(self) -> dict[str, Any]: ...

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> list[Answer]:
        """Run all to their end: ``concurrency`` at a time, or each at its own time if that is None."""
        ...

    def close(self) -> None: ...


def start(system: str, setup: Setup, pythons: Mapping[str, Path]) -> Running:
    """Start a system; ``pythons`` are of those with an environment of their own.

    Raises:
        PeerFailure: it did not come up.
    """
    return Server(setup) if system == "weft-http" else Worker(system, setup, pythons)


class Worker:
    """A system whose worker (``worker.py``) runs in a process of its own."""

    def __init__(self, system: str, setup: Setup, pythons: Mapping[str, Path]) -> None:
        python = pythons.get(system, Path(sys.executable))
        if not python.exists():
            raise PeerFailure(f"{system} is not installed at {python}: `make bench-peers` does that")
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), **threads(setup.threads)}
        if system == "vllm":
            environment |= for_vllm(python)
        self._system = system
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", f"peers.{MODULES[system]}"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about: dict[str, Any] = self._ask(asdict(setup), START_SECONDS)["about"]

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> list[Answer]:
        requests = [
            {**asdict(arrival), "model": None if arrival.model == BASE else arrival.model} for arrival in arrivals
        ]
        traces = self._ask({"requests": requests, "concurrency": concurrency}, JOB_SECONDS)["traces"]
        return [
            Answer(Trace(a.model, t["arrival"], len(a.prompt), t["times"], t["counts"]), t["tokens"])
            for a, t in zip(arrivals, traces, strict=True)
        ]

    def close(self) -> None:
        """End the process: it has no more lines to read."""
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._log.close()

    def _ask(self, what: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write a line and read one; a system that takes longer is ended."""
        limit = threading.Timer(seconds, self._process.kill)
        limit.start()
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            self._log.seek(0)
            raise PeerFailure(f"{self._system} ended; its log ends with\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Server:
    """``weft serve``, asked over HTTP by this process."""

    def __init__(self, setup: Setup) -> None:
        given = [option for name, folder in setup.adapters.items() for option in ("--adapter", f"{name}={folder}")]
        limits = {
            "--dtype": setup.dtype,
            "--max-model-len": str(setup.max_model_len),
            "--max-num-seqs": str(setup.max_num_seqs),
            "--max-adapters": str(max(1, len(setup.adapters))),
        }
        options = [part for option in limits.items() for part in option]
        self._stack = ExitStack()
        environment = threads(setup.threads)
        server = demo_server(setup.model, "--device", "cpu", *given, *options, environment=environment)
        try:
            url = self._stack.enter_context(server)
        except SystemExit as failure:
            raise PeerFailure(str(failure)) from failure
        self._target = LiveTarget(url)
        self.about: dict[str, Any] = {"versions": {}, "settings": limits}

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> list[Answer]:
        base = self._target.base
        named = [Arrival(a.time, base if a.model == BASE else a.model, a.prompt, a.max_tokens) for a in arrivals]
        traces, _ = self._target.run(named, concurrency)
        return [Answer(trace, []) for trace in traces]

    def close(self) -> None:
        """End the server."""
        self._stack.close()


def threads(count: int) -> dict[str, str]:
    """The variables that set the number of threads of a computation."""
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def for_vllm(python: Path) -> dict[str, str]:
    """vLLM's recommendations for CPUs: threads bound to cores, Intel's OpenMP and tcmalloc where they are there."""
    libraries = [*python.parent.parent.glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "LD_PRELOAD": ":".join(str(library) for library in libraries),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
