"""The benchmark's script: one target by its options, and the suite's own workloads."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.server.bench.workload import Workload


def test_one_target_by_options(run_script: Callable[..., str], tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    adapters = [make_lora(base, tmp_path / f"a{i}", seed=i, r=4, target_modules=["q_proj"]) for i in range(2)]
    given = [option for i, folder in enumerate(adapters) for option in ("--adapter", f"a{i}={folder}")]
    out = tmp_path / "out.json"
    load = ["--requests", "6", "--rate", "100", "--cv", "2", "--popularity", "zipf", "--vocab-size", "100"]
    lengths = ["--prompt-tokens", "4:20", "--output-tokens", "5"]
    printed = run_script("bench_serving.py", "--offline", "--model", base, *given, *load, *lengths, "--out", out)
    report = json.loads(out.read_text())
    assert report["command"].startswith("bench_serving.py --offline --model ")
    assert report["device"]["cores"] >= 1
    run = report["runs"]["offline"]
    assert (run["workload"]["popularity"], run["workload"]["rate"], run["workload"]["cv"]) == ("zipf", 100.0, 2.0)
    assert run["results"]["output_tokens"] == 30
    assert set(run["results"]["output_tokens_by_model"]) <= {"a0", "a1"}
    assert run["target"]["parameters"] > 0
    assert printed.splitlines()[0].split()[:3] == ["run", "done", "errors"]


def test_the_suite_covers_the_fields_workloads(repository: Path) -> None:
    workloads = runpy.run_path(str(repository / "benchmarks" / "bench_serving.py"))["WORKLOADS"]
    assert all(isinstance(workload, Workload) for workload in workloads.values())
    patterns = {workload.popularity for workload in workloads.values()}
    assert patterns == {"distinct", "uniform", "skewed", "identical", "zipf", "power"}
    assert any(workload.rate is not None for workload in workloads.values())
