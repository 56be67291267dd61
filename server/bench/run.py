"""One workload on one target: the engine in this process or a live server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from weft.server.bench.measure import StepAdapters, Trace, summarise
from weft.server.bench.workload import Arrival, Workload


class Target(Protocol):
    """What runs a workload; ``base`` and ``adapters`` are the names of its models, ``about`` says what it is."""

    @property
    def base(self) -> str: ...

    @property
    def adapters(self) -> list[str]: ...

    @property
    def about(self) -> dict[str, Any]: ...

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> tuple[list[Trace], StepAdapters]: ...


def measure(target: Target, workload: Workload, models: Sequence[str]) -> dict[str, Any]:
    """Run ``workload`` over ``models``; the workload and its figures, ready for JSON."""
    arrivals = workload.sample(models)
    traces, step_adapters = target.run(arrivals, workload.concurrency if workload.rate is None else None)
    return {
        "target": target.about,
        "workload": asdict(workload),
        "models": list(models),
        "results": summarise(traces, step_adapters),
    }
