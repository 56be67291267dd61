"""The comparison with peers: the harness on a tiny model, the loop that drives engines, ratios, the README's table."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

TINY = "64:2:1:96:200"


@pytest.fixture
def peers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the benchmark."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


@pytest.fixture
def bench(peers: None, repository: Path, tmp_path: Path) -> Any:
    """weft and peft on a tiny model."""
    from bench_peers import Bench
    from peers.materials import Workshop, llama

    return Bench(Workshop(tmp_path, llama(TINY)), ("weft", "peft"), 1, {"vllm": repository / "none"}, 8)


def test_weft_and_peft_answer_alike(bench: Any) -> None:
    assert bench.agreement() == {"weft": {"rows": 8, "first_equal": 8, "equal": 8}}
    assert bench.failures == {}


LLAMA_PYTHON = Path(__file__).resolve().parents[2] / ".venv-llama" / "bin" / "python"


@pytest.mark.skipif(not LLAMA_PYTHON.exists(), reason="llama.cpp is compiled by `make bench-peers` alone")
def test_llama_cpp_and_peft_answer_alike(bench: Any) -> None:
    bench._systems, bench._pythons = ("peft", "llama.cpp"), {"llama.cpp": LLAMA_PYTHON}
    assert bench.agreement() == {"llama.cpp": {"rows": 8, "first_equal": 8, "equal": 8}}
    assert bench.failures == {}


def test_every_case_is_run_as_often_as_asked(bench: Any) -> None:
    from peers.plan import Case, uniform

    burst = Case(uniform(2), True, 16, 4, 4, 4, systems=("weft",))
    reports = bench.run([burst, replace(burst, mixed=False, rate=200.0)], 2)
    assert [(each["role"], each["mixed"]) for each in reports] == [("http", True), ("load", False)]
    for each, models in zip(reports, (2, 1), strict=True):
        runs = each["runs"]["weft"]
        assert [(run["completed"], run["output_tokens"]) for run in runs] == [(4, 16), (4, 16)]
        assert len(runs[0]["output_tokens_by_model"]) == models
        rates = [run["output_tokens_per_s"] for run in runs]
        assert each["figures"]["weft"]["output_tokens_per_s"]["high"] == max(rates)
    assert bench.failures == {}


def test_a_system_that_fails_is_told_and_left_out(bench: Any) -> None:
    from peers.plan import BASE, Case

    bench._systems = ("vllm",)
    assert bench.run([Case(BASE, False, 16, 4, 4, 4)], 1) == []
    assert "not installed" in bench.failures["vllm, no adapters"]


@pytest.mark.slow
def test_the_command_with_every_system_of_this_environment(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    systems = "weft,weft-http,peft,transformers"
    options = ["--quick", "--threads", "1", "--shape", TINY, "--rate", "20", "--peers", systems, "--out", out]
    script = repository / "benchmarks" / "bench_peers.py"
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(out.read_text())
    expected = [{"weft", "peft", "transformers"}] * 2 + [{"weft", "peft"}] + [{"weft", "peft", "weft-http"}] * 2
    assert [set(case["runs"]) for case in report["cases"]][:5] == expected
    for case in report["cases"]:
        tokens = case["requests"] * case["output_tokens"]
        assert all(run["output_tokens"] == tokens for runs in case["runs"].values() for run in runs)
    measured = [row["target"] for row in report["ratios"] if row["ratio"] is not None]
    assert len(measured) == 6
    assert not any("vLLM" in target for target in measured)


@pytest.mark.usefixtures("peers")
def test_options_that_cannot_be_honoured(tmp_path: Path) -> None:
    from bench_peers import main

    with pytest.raises(typer.BadParameter, match="there is no sglang"):
        main(peers="weft,sglang")
    with pytest.raises(typer.BadParameter, match="make bench-peers"):
        main(peers="vllm", vllm_python=tmp_path / "none")
    with pytest.raises(typer.BadParameter, match=r"leave out llama\.cpp"):
        main(peers="weft,llama.cpp", llama_python=tmp_path / "none")
    with pytest.raises(typer.BadParameter, match="no case has 'nothing'"):
        main(peers="weft", cases="nothing")


@pytest.mark.usefixtures("peers")
def test_llama_cpp_is_left_out_where_it_could_not_be_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench_peers import choose
    from peers.plan import SYSTEMS

    here, none = Path(sys.executable), tmp_path / "none"
    assert choose(None, {"vllm": here, "llama.cpp": here}) == SYSTEMS
    assert set(SYSTEMS) - set(choose(None, {"vllm": here, "llama.cpp": none})) == {"llama.cpp"}
    assert "WITHOUT llama.cpp" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="vllm is not at"):
        choose(None, {"vllm": none, "llama.cpp": here})


class Echo:
    """An engine that gives every request one token in each step, its own number."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.most = 0

    def add(self, index: int, request: Any) -> None:
        self.left[index] = request.max_tokens
        self.most = max(self.most, len(self.left))

    def step(self) -> Iterator[tuple[int, Sequence[int], bool]]:
        for index in list(self.left):
            self.left[index] -= 1
            ended = self.left[index] == 0
            if ended:
                del self.left[index]
            yield index, [index], ended


@pytest.mark.usefixtures("peers")
def test_the_loop_keeps_its_concurrency_and_its_times() -> None:
    from peers.worker import Request, drive

    requests = [Request(0.02 * i, None, [1], 3) for i in range(5)]
    engine = Echo()
    traces = drive(engine, requests, 2)
    assert engine.most == 2
    assert [trace.tokens for trace in traces] == [[i] * 3 for i in range(5)]
    open_loop = drive(Echo(), requests, None)
    assert [trace.arrival for trace in open_loop] == [request.time for request in requests]
    assert all(trace.times[0] >= trace.arrival for trace in open_loop)


def run(throughput: float, ttft: float | None) -> dict[str, Any]:
    return {
        "output_tokens_per_s": throughput,
        "ttft_ms": {"p50": ttft, "p99": ttft},
        "error_messages": ["out of memory"],
    }


@pytest.mark.usefixtures("peers")
def test_ratios_are_of_the_same_repetition() -> None:
    from peers.plan import BASE, TARGET
    from peers.report import ratios
    from readme import targets

    base = {"weft": [run(130, 1), run(60, 1), run(140, 1)], "vllm": [run(100, 1), run(50, 1), run(100, 1)]}
    base["llama.cpp"] = base["vllm"]
    load = {"weft": [run(1, 20)], "vllm": [run(1, 10)]}
    cases = [
        {"adapters": BASE.name, "mixed": False, "role": "burst", "runs": base},
        {"adapters": TARGET.name, "mixed": True, "role": "load", "runs": load},
    ]
    rows = {row["target"]: row for row in ratios(cases)}
    throughput = rows["base: throughput over vLLM's"]
    assert (throughput["ratio"], throughput["met"]) == (pytest.approx({"median": 1.3, "low": 1.2, "high": 1.4}), True)
    ttft = rows["under load: vLLM's TTFT p50 over weft's"]
    assert (ttft["ratio"]["median"], ttft["met"]) == (0.5, False)
    report = {
        "date": "2026-01-02T03:04",
        "command": "bench_peers.py --vllm-python .venv-vllm/bin/python --cases '^[n8]'",
        "device": {"cpu": "a CPU"},
        "threads": 2,
        "repeat": 3,
        "commit": "f" * 40,
        "versions": {"weft": "1", "triton": None},
        "systems": {"no adapters": {"vllm": {"versions": {"vllm": "2", "weft": "0"}}}},
    }
    older = {**report, "repeat": 1, "commit": "e" * 40, "cases": [{**case, "runs": base} for case in cases]}
    text = targets([{**report, "cases": cases[1:]}, {**older, "cases": cases[:1]}])
    assert "Run 1: 2026-01-02, a CPU, commit `ffffffffffff`, 2 threads, 3 repetitions: vllm 2, weft 1." in text
    assert "Run 2: 2026-01-02, a CPU, commit `eeeeeeeeeeee`, 2 threads, 1 repetition: vllm 2, weft 1." in text
    assert "| base: throughput over vLLM's | 1.2 | 1.30 (1.20 to 1.40) | 130.0 tok/s | 100.0 tok/s | met |" in text
    assert """| met | 2 | `make bench-peers ARGS="--cases '^[n8]'"` |""" in text
    assert "| under load: PEFT's TTFT p50 over weft's | 1 | not measured |" in text
    assert "| base: throughput over llama.cpp's |  | 1.30 (1.20 to 1.40) | 130.0 tok/s | 100.0 tok/s |  | 2 |" in text
    with pytest.raises(ValueError, match=r"ttft_ms\.p50.*out of memory"):
        ratios([{**cases[1], "runs": {**load, "vllm": [run(1, None)]}}])


@pytest.mark.usefixtures("peers")
def test_the_readme_has_what_was_measured(tmp_path: Path) -> None:
    from readme import README, fill

    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    fill(copy)
    assert copy.read_text() == README.read_text()
