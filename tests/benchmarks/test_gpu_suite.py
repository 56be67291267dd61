"""The GPU suite, as far as it runs without one: correctness under Triton's interpreter, and all that is arithmetic."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

LORA = ["grouped_lora", "grouped_lora in halves", "grouped_lora in one"]
KERNELS = [*LORA, "paged_attention", "grouped_affine", "write_kv", "weighted_sum", "logit_mix"]


@pytest.fixture(autouse=True)
def suite_on_path(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python benchmarks/gpu_suite.py`` has it."""
    monkeypatch.syspath_prepend(repository / "benchmarks")


def run_suite(repository: Path, out: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, repository / "benchmarks" / "gpu_suite.py", "--device", "cpu", "--seed", "1", *options]
    environment = {**os.environ, "OUT": str(out), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
    (path,) = out.glob("*.json")
    return result, json.loads(path.read_text())


def draw_of_rows() -> Any:
    """A case of several rows, one with an adapter and one of the base among them."""
    from gpu.cases import Draw

    draws = (Draw(random.Random(seed), torch.float32, small=True) for seed in range(99))
    seed = next(index for index, draw in enumerate(draws) if len(draw.slots()) > 2)
    return Draw(random.Random(seed), torch.float32, small=True)


def test_it_checks_kernels_and_the_engine(repository: Path, tmp_path: Path) -> None:
    options = [
        "--sections",
        "correctness",
        "--rounds",
        "1",
        "--dtypes",
        "fp32",
        "--adapters",
        "1",
        "--kernels",
        *KERNELS,
    ]
    result, written = run_suite(repository, tmp_path, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert written["device"].startswith("cpu") and written["torch"] == torch.__version__
    found = written["sections"]["correctness"]
    assert found["failures"] == [] and found["skipped"] == [] and set(found["kernels"]) == set(KERNELS)
    assert all(0 <= each["fp32"]["largest_error"] <= 1e-5 for each in found["kernels"].values())
    assert found["engine"]["eager"]["equal"] == found["engine"]["eager"]["rows"] == 2


def test_what_there_is_no_time_for_is_said(repository: Path, tmp_path: Path) -> None:
    result, written = run_suite(repository, tmp_path, "--limit-seconds", "1", "--models", "tiny", "--batches", "1")
    sections = written["sections"]
    assert set(sections) == {"correctness", "bandwidth", "attention", "decode"}, result.stderr
    assert all(section["skipped"] for section in sections.values())


def test_it_checks_and_times_the_attention_backends(repository: Path, tmp_path: Path) -> None:
    """On a CPU there is one, and nothing of it is special to this device."""
    options = ["--sections", "attention", "--rounds", "2", "--models", "tiny"]
    result, written = run_suite(repository, tmp_path, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    found = written["sections"]["attention"]
    assert set(found["absent"]) == {"varlen", "flashinfer"} and found["failures"] == [] and found["skipped"] == []
    errors = found["kernels"]["attention by triton"]
    assert {dtype: each["cases"] for dtype, each in errors.items()} == {"fp16": 2, "bf16": 2}
    assert [row["page_size"] for row in found["attention"]] == [16, 16, 256, 256]
    assert all(row["backends"]["triton"]["seconds"] > 0 for row in found["attention"])


def test_a_wrong_attention_backend_is_found() -> None:
    from gpu.attention import check
    from gpu.budget import Share

    from weft.kernels.paged_attention.backends import Triton

    def off(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return Triton().attend(q, *rest, **options) + 0.1

    found = check(Share(float("inf")), torch.device("cpu"), [Triton(attend=off)], rounds=1, seed=1)
    assert len(found["failures"]) == 2 and all("is beyond" in each["problem"] for each in found["failures"])


def test_a_wrong_result_is_found(repository: Path) -> None:
    """Values that are off, places that must not be written, and memory that is not written at all."""
    from gpu.cases import affine, gates
    from gpu.correctness import error_of

    cpu = torch.device("cpu")
    case = affine(draw_of_rows())
    assert error_of(case, cpu) < 1e-5

    def off(y: torch.Tensor, *rest: Any) -> None:
        case.launch(y, *rest)
        y[case.written[0][1]] += 0.01

    assert error_of(replace(case, launch=off), cpu) > 1e-3

    def beyond(y: torch.Tensor, *rest: Any) -> None:
        case.launch(y, *rest)
        y[~case.written[0][1]] += 0.01

    with pytest.raises(AssertionError, match="must not"):
        error_of(replace(case, launch=beyond), cpu)
    returned = gates(draw_of_rows())
    unwritten = replace(returned, launch=lambda *args: torch.empty_like(returned.reference(*args)))
    assert error_of(unwritten, cpu) != error_of(unwritten, cpu), "memory that nobody wrote is NaN"


def test_the_reference_is_in_double(repository: Path) -> None:
    from gpu.cases import lora
    from gpu.double import in_double, widened

    case = lora(draw_of_rows())
    wide = widened(case.args)
    before = wide[0].clone()
    with in_double():
        case.reference(*wide)
    assert wide[0].dtype == torch.float64 and not torch.equal(before, wide[0])
    y, x, a, b, groups = widened(case.args)
    for slot, start, stop in groups.segments:
        rows = groups.order[start:stop].long()
        y[rows] += x[rows] @ a.of(slot).T @ b.of(slot)
    torch.testing.assert_close(wide[0], y, rtol=1e-13, atol=1e-13)
    assert torch.get_default_dtype() == torch.float32


def test_the_bytes_are_those_of_the_models() -> None:
    """The table: Llama-3-8B and Qwen3-4B in bf16, and ratios that follow from it."""
    from gpu.shapes import SHAPES, ideal_ratio, ranks_of, site_bytes, spread

    llama, qwen = SHAPES["llama-3-8b"], SHAPES["qwen3-4b"]
    assert round(llama.weight_bytes / 1e9, 2) == 15.01 and round(qwen.weight_bytes / 1e9, 2) == 8.04
    assert round(llama.adapter_bytes(1) / 1e6, 2) == 5.24 and round(qwen.adapter_bytes(1) / 1e6, 2) == 4.13
    for adapters, rank, expected in ((1, 16, 0.994), (8, 16, 0.957), (32, 16, 0.848), (64, 16, 0.737), (64, 64, 0.411)):
        assert round(ideal_ratio(llama, 64, 0, ranks_of(adapters, rank)), 3) == expected
    assert llama.kv_bytes(1) == 2 * 32 * 2 * 8 * 128
    assert ranks_of(4, None) == [8, 16, 64, 8] and spread(5, 2) == [0, 1, 0, 1, 0] and spread(2, 0) == [-1, -1]
    # Two slots of ranks 8 and 64, one row on each, one on the base: factors once, x once, y twice.
    assert site_bytes(100, 10, [0, 1, -1], [8, 64, 16]) == 2 * (72 * 110 + 2 * 120)


def test_workloads_cover_what_is_promised() -> None:
    from gpu.bandwidth import workloads

    every = list(workloads(["llama-3-8b", "qwen3-4b"]))
    assert {w.pattern for w in every} == {"even", "distinct", "uniform", "skewed", "identical"}
    assert {(w.adapters, w.rank) for w in every} >= {(n, r) for n in (1, 8, 64) for r in (8, 16, 64, None)}
    assert {len(w.slots) for w in every} == {1, 4, 16, 32, 64, 128, 256}
    assert any(w.total_rank >= 512 for w in every)


def test_ways_to_run_an_update_are_timed_and_equal() -> None:
    """Each makes the same y; of what there is no time for, it is said."""
    from gpu import ways
    from gpu.bandwidth import make_problem
    from gpu.budget import Share

    cpu = torch.device("cpu")
    problem = make_problem([0, 1, 0], [8, 16], 64, 96, cpu, torch.float32)
    weight = torch.randn(96, 64)
    made = {way: run() for way, run in ways.ways(problem, weight, None)}
    alone = made.pop("product alone")
    assert set(made) == {"two launches after", "one launch after"}
    torch.testing.assert_close(made["one launch after"], made["two launches after"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, made["one launch after"])
    at = [0.0]
    share = Share(3.0, lambda: at.append(at[-1] + 1) or at[-1])
    rows = ways.measure(share, cpu, models=["tiny"], batches=[1], dtype=torch.float32)
    assert [row["site"] for row in rows] == ["q_proj", "gate_proj"] and all(row["one_launch_chosen"] for row in rows)
    assert share.skipped == ["ways to run an update: 10 of 12"]
    assert set(ways.totals(rows)) == {"product alone", *made} and ways.totals(rows)["two launches after"] == 1


def test_results_survive_and_a_picture_is_drawn(tmp_path: Path) -> None:
    from gpu.budget import Results
    from gpu.plot import Panel, panels, svg

    path = tmp_path / "results" / "a.json"
    results = Results(path, {"device": "none"})
    step = {"batch": 8, "adapters": 8, "rank": 16, "mode": "graphs", "seconds": 0.01, "measured_of_ideal": 0.9}
    results.add("decode", {"models": {"llama-3-8b": {"steps": [step]}}, "worst": float("nan")})
    assert json.loads(path.read_text())["sections"]["decode"]["worst"] == "nan"
    (panel,) = panels(results.data["sections"])
    assert panel.curves == {"8 x r16, graphs": [(8, 0.9)]}
    drawn = svg([panel, Panel("<", "x", "y", {"b": [(1, 2.0), (4, 1.0)]})])
    assert drawn.count("<polyline") == 2 and "&lt;" in drawn


def test_a_bare_checkout_needs_no_installation(repository: Path) -> None:
    """``-S`` and ``-I``: without site-packages, where weft is installed here."""
    program = (
        f"import sys; sys.path.insert(0, {str(repository / 'benchmarks')!r})\n"
        "from gpu.checkout import make_importable; make_importable()\n"
        "import importlib.util as u\n"
        "print(*(u.find_spec('weft.' + n).origin for n in ('server', 'adapters', 'kernels')))\n"
        "assert u.find_spec('kernels') is None and u.find_spec('adapters') is None"
    )
    result = subprocess.run([sys.executable, "-S", "-I", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(repository / n / "__init__.py") for n in ("server", "adapters", "kernels")]
