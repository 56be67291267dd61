import os
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "weft.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "target",
    ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "gfx942"))],
)
def test_every_kernel_compiles(target: str) -> None:
    result = run("--target", target)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = ("shrink", "expand", "fused", "delta", "rotate", "sparse", "affine", "turn", "attention", "write_kv")
    others = (
        "prefix",
        "route",
        "score gates",
        "mean gates",
        "weigh",
        "weighted sum",
        "logit mix",
        "rms norm",
        "gated act",
        "rotary",
    )
    for kernel in (*kernels, *others):
        assert f"{target:8}" in result.stdout and kernel in result.stdout


def test_a_spill_over_the_bound_fails() -> None:
    result = run("--target", "gfx942", "--spill-bound", "-1")
    assert result.returncode == 1 and "OVER THE BOUND" in result.stdout
