"""The benchmark of decoding runs, and prints what it measured."""

import re
import subprocess
import sys
from pathlib import Path


def test_it_prints_rates_of_prefill_and_decoding(repository: Path) -> None:
    options = ["--rows", "2", "--prompt", "5", "--output", "4", "--layers", "1", "--adapters", "2", "--rounds", "1"]
    command = [sys.executable, repository / "benchmarks" / "decode.py", *options, "--threads", "1", "--breakdown"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for kind in ("base", "mixed"):
        for what in ("prefill", "decode "):
            assert re.search(rf"^{kind} +{what} +\d+ tok/s", result.stdout, re.MULTILINE), result.stdout
        assert f"{kind}, operators of a decoding step" in result.stdout
    assert "mixed / base, decode: " in result.stdout and "aten::mm" in result.stdout
