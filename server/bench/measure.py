"""What is measured of each request, and the figures of a whole run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Trace:
    """One request as its client saw it. Times are seconds on the run's own clock.

    Attributes:
        arrival: when it was due, which is when its user began to wait.
        times: of the arrival of each batch of output tokens.
        counts: output tokens in each of them.
        error: why it failed, if it did.
    """

    model: str
    arrival: float
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    error: str | None = None

    def record(self, now: float, tokens: int) -> None:
        if tokens:
            self.times.append(now)
            self.counts.append(tokens)

    @property
    def output_tokens(self) -> int:
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive tokens; tokens that came together share the time since the last ones."""
        steps = zip(self.times, self.times[1:], self.counts[1:], strict=False)
        return [(late - early) / count for early, late, count in steps for _ in range(count)]


@dataclass
class StepAdapters:
    """Distinct adapters per forward pass: the mean over the run and the most in one step, as far as they are known."""

    mean: float | None = None
    most: int | None = None


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def summarise(traces: Sequence[Trace], step_adapters: StepAdapters) -> dict[str, Any]:
    """Figures of one run: throughput over its span, latencies in milliseconds, tokens by model."""
    good = [trace for trace in traces if trace.error is None and trace.times]
    failed = [trace for trace in traces if trace.error is not None]
    begin = min((trace.arrival for trace in traces), default=0.0)
    span = max((trace.times[-1] for trace in good), default=begin) - begin
    output, prompt = sum(t.output_tokens for t in good), sum(t.prompt_tokens for t in good)
    by_model: Counter[str] = Counter()
    for trace in good:
        by_model[trace.model] += trace.output_tokens
    return {
        "duration_s": span,
        "requests": len(traces),
        "completed": len(good),
        "errors": len(failed),
        "error_messages": sorted({trace.error for trace in failed if trace.error})[:5],
        "requests_per_s": _rate(len(good), span),
        "output_tokens_per_s": _rate(output, span),
        "total_tokens_per_s": _rate(output + prompt, span),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "ttft_ms": percentiles([trace.ttft for trace in good]),
        "itl_ms": percentiles([gap for trace in good for gap in trace.gaps]),
        "latency_ms": percentiles([trace.times[-1] - trace.arrival for trace in good]),
        "output_tokens_by_model": dict(sorted(by_model.items())),
        "adapters_per_step_mean": step_adapters.mean,
        "adapters_per_step_max": step_adapters.most,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, p50, p90 and p99 in milliseconds; None where there is nothing."""
    if not seconds:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return {"mean": float(np.mean(seconds)) * 1e3, "p50": p50 * 1e3, "p90": p90 * 1e3, "p99": p99 * 1e3}


def _rate(count: int, span: float) -> float | None:
    return count / span if span > 0 else None
