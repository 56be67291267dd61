"""Writes the table of targets into ``benchmarks/README.md`` from the measured figures, so that the two never disagree.

python benchmarks/peers/readme.py
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.report import least, measured, ratios

HERE = Path(__file__).resolve().parent.parent
README = HERE / "README.md"
RESULT = HERE / "results" / "peers-cpu.json"
COMMAND = "make bench-peers"
# What depends on the machine, and is given by make.
OMITTED = ("--vllm-python", "--llama-python", "--out")
SECTION = re.compile(r"(?<=<!-- peers-cpu -->\n).*?(?=<!-- /peers-cpu -->)", re.DOTALL)


def render(report: Mapping[str, Any] | None) -> str:
    """The section's text; ``report`` is that of ``bench_peers.py``, None before there is one."""
    rows = [
        "| target | at least | measured | ours | theirs | verdict | command |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    command = COMMAND if report is None else _command(report["command"])
    for row in ratios([] if report is None else report["cases"]):
        cells = [row["target"], least(row), *measured(row), f"`{command}`"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*([] if report is None else [_where(report), ""]), *rows]) + "\n"


def _command(typed: str) -> str:
    """The target of make that does the same as the program that was called."""
    words = iter(shlex.split(typed)[1:])
    kept = [word for word in words if not (word in OMITTED and next(words))]
    return f'{COMMAND} ARGS="{shlex.join(kept)}"' if kept else COMMAND


def _where(report: Mapping[str, Any]) -> str:
    """Where and when the figures were measured."""
    device, threads, repeat = report["device"], report["threads"], report["repeat"]
    versions = dict(report["versions"])
    for about in (about for systems in report["systems"].values() for about in systems.values()):
        versions = about["versions"] | versions
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
    return (
        f"{report['date'][:10]}, {device['cpu']}, {threads} threads, {repeat} repetitions, commit "
        f"`{str(report['commit'])[:12]}`: {named}."
    )


def fill(readme: Path = README, result: Path = RESULT) -> None:
    """Write the section anew."""
    report = json.loads(result.read_text()) if result.exists() else None
    text = readme.read_text()
    if not SECTION.search(text):
        raise SystemExit(f"{readme} has no section <!-- peers-cpu -->")
    readme.write_text(SECTION.sub(lambda _: render(report), text))


if __name__ == "__main__":
    fill()
