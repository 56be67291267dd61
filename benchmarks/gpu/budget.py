"""The time that the suite has, the shares of its sections, and the file that keeps what was measured."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass
class Share:
    """What one section may take.

    Attributes:
        ends: on ``clock``, in seconds.
        skipped: what there was no time for.
    """

    ends: float
    clock: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.clock() >= self.ends

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.ends - self.clock())

    def skip(self, what: str) -> None:
        """Note what is left out."""
        self.skipped.append(what)
        print(f"  skipped for want of time: {what}", flush=True)

    def part(self, of: float) -> Share:
        """A part of what is left, which notes omissions here."""
        return Share(self.clock() + of * self.seconds_left, self.clock, self.skipped)


class Results:
    """What is known so far, as JSON; written whole after every section, so that a run that is cut off keeps it."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "sections": {}}
        self.write()

    def add(self, section: str, data: dict[str, Any]) -> None:
        """Keep a section's figures."""
        self.data["sections"][section] = data
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(_plain(self.data), indent=1, allow_nan=False) + "\n")
        whole.replace(self.path)


def result_path(folder: Path | None, device: str) -> Path:
    """``<device>-<date>.json`` in ``folder``, in ``$OUT``, or among the results of the repository."""
    own = os.environ.get("OUT")
    where = folder or (Path(own) if own else Path(__file__).resolve().parents[1] / "results")
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    return where / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def _plain(value: Any) -> Any:
    """JSON has no NaN: it is told as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
