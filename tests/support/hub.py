"""The fixtures that the AdapterHub library wrote: ``tests/fixtures/adapterhub``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fixtures" / "adapterhub"
ARCHITECTURES = ("llama", "gpt2", "mistral", "qwen2")


@dataclass(frozen=True)
class Answer:
    """What the library answers with one adapter alone, greedily."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def base_of(arch: str) -> Path:
    """The tiny base of an architecture."""
    return FOLDER / arch / "base"


@cache
def expected(arch: str) -> dict[str, Answer]:
    """Answers by adapter; of the base under ``base``."""
    answers = json.loads((FOLDER / arch / "expected.json").read_text())
    return {name: Answer(a["prompt"], a["tokens"], a["logprobs"]) for name, a in answers.items()}


def adapters_of(arch: str) -> dict[str, Path]:
    """Every adapter of an architecture."""
    return {name: FOLDER / arch / name for name in expected(arch) if name != "base"}
