"""The benchmark of compositions runs, and prints what it measured."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.models import tiny_model


def test_it_prints_steps_and_weighting_steps(repository: Path, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    options = ["--model", base, "--rank", "2", "--members", "3", "--rows", "2", "--steps", "4", "--rounds", "1"]
    command = [sys.executable, repository / "benchmarks" / "composition.py", *options, "--weightings", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for what in ("decoding step, plain", "decoding step, composed", "weighting step"):
        assert re.search(rf"^{what} +median +\d+\.\d+ ms", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^composed / plain: median \d\.\d+, ", result.stdout, re.MULTILINE), result.stdout
