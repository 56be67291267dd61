"""The benchmark of compositions runs, and prints what it measured."""

import re
from collections.abc import Callable
from pathlib import Path

from tests.support.models import tiny_model


def test_it_prints_steps_and_weighting_steps(run_script: Callable[..., str], tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    options = ["--model", base, "--rank", 2, "--members", 3, "--rows", 2, "--steps", 4, "--rounds", 1]
    printed = run_script("composition.py", *options, "--weightings", 3)
    for what in ("decoding step, plain", "decoding step, composed", "weighting step"):
        assert re.search(rf"^{what} +median +\d+\.\d+ ms", printed, re.MULTILINE), printed
    assert re.search(r"^composed / plain: median \d\.\d+, ", printed, re.MULTILINE), printed
