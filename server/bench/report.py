"""A benchmark's result: where it was measured, as JSON, and as a table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("weft", "torch", "transformers", "triton")
HEADER = ("run", "done", "errors", "out tok/s", "req/s", "TTFT p50", "p99 ms", "ITL p50", "p99 ms", "adapters/step")


def environment(command: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, the commit and the command of a run.

    Args:
        command: as it was typed; only the name of the program is kept of its path.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
        "commit": _commit(),
        "device": _device(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figures of each run, by name, a row each."""
    rows = [HEADER, *(_row(name, run) for name, run in runs.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _row(name: str, run: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        str(run["completed"]),
        str(run["errors"]),
        _number(run["output_tokens_per_s"]),
        _number(run["requests_per_s"], 2),
        _number(run["ttft_ms"]["p50"]),
        _number(run["ttft_ms"]["p99"]),
        _number(run["itl_ms"]["p50"]),
        _number(run["itl_ms"]["p99"]),
        _number(run["adapters_per_step_mean"]),
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout this file is part of, ``-dirty`` where it has changes; None outside of one."""
    here = Path(__file__).resolve()
    try:
        _git(
            here.parent, "ls-files", "--error-unmatch", here.name
        )  # else the repository is one that weft lies in by chance
        return _git(here.parent, "describe", "--always", "--abbrev=40", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _device() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
