"""The figures of a run, worked out by hand."""

import pytest

from weft.server.bench.measure import StepAdapters, Trace, percentiles, summarise


def trace(model: str, arrival: float, *tokens: tuple[float, int], error: str | None = None) -> Trace:
    result = Trace(model, arrival, prompt_tokens=10, error=error)
    for time, count in tokens:
        result.record(time, count)
    return result


def test_a_requests_own_figures() -> None:
    one = trace("a", 1.0, (1.5, 1), (1.7, 2), (1.8, 0), (2.0, 1))
    assert one.output_tokens == 4
    assert one.ttft == pytest.approx(0.5)
    assert one.gaps == pytest.approx([0.1, 0.1, 0.3])


def test_the_figures_of_a_run() -> None:
    traces = [
        trace("a", 1.0, (2.0, 1), (3.0, 1)),
        trace("b", 1.0, (1.5, 1), (5.0, 3)),
        trace("a", 2.0, error="429: full"),
    ]
    figures = summarise(traces, StepAdapters(1.5, 2))
    assert (figures["requests"], figures["completed"], figures["errors"]) == (3, 2, 1)
    assert figures["error_messages"] == ["429: full"]
    assert figures["duration_s"] == pytest.approx(4.0)
    assert figures["output_tokens_per_s"] == pytest.approx(6 / 4)
    assert figures["total_tokens_per_s"] == pytest.approx(26 / 4)
    assert figures["requests_per_s"] == pytest.approx(0.5)
    assert figures["ttft_ms"]["p50"] == pytest.approx(750)
    assert figures["latency_ms"]["mean"] == pytest.approx(3000)
    assert figures["output_tokens_by_model"] == {"a": 2, "b": 4}
    assert (figures["adapters_per_step_mean"], figures["adapters_per_step_max"]) == (1.5, 2)


def test_a_run_in_which_nothing_worked_has_no_latencies() -> None:
    figures = summarise([trace("a", 0.0, error="refused")], StepAdapters())
    assert (figures["completed"], figures["errors"]) == (0, 1)
    assert figures["output_tokens_per_s"] is None
    assert figures["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_percentiles_are_milliseconds() -> None:
    assert percentiles([i / 1000 for i in range(101)]) == pytest.approx({"mean": 50, "p50": 50, "p90": 90, "p99": 99})
