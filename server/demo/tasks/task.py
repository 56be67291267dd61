"""What a demo task is, and how its examples are divided into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

Split = Literal["train", "held-out"]

HELD_OUT_SHARE = 0.1
"""Share of all possible examples that no training run ever sees."""


class Pair(NamedTuple):
    """The two sides of one example, without the wording of the prompt around them."""

    source: str
    target: str


class Example(NamedTuple):
    """One prompt and the exact completion the adapter should answer with."""

    prompt: str
    completion: str


def source_of(pair: Pair) -> str:
    """The usual split key: two examples with the same source always fall on the same side."""
    return pair.source


@dataclass(frozen=True)
class Task:
    """A task one adapter is trained for."""

    id: str
    description: str
    form: str
    """The prompt, with `{}` where the source goes."""
    pair: Callable[[Random], Pair]
    """Draws one source and its only right target."""
    split_key: Callable[[Pair], str] = source_of
    """What must not be shared between training and held-out examples."""

    def generate(self, rng: Random) -> Example:
        """Draw one example from all of them, whatever its split."""
        return self.example(self.pair(rng))

    def example(self, pair: Pair) -> Example:
        """Word a pair as a prompt and its completion."""
        # The completion starts with the space that follows the colon of the prompt, so that the
        # tokens of prompt + completion are the tokens of the two texts apart.
        return Example(self.form.format(pair.source), " " + pair.target)

    def split_of(self, pair: Pair) -> Split:
        """The side a pair belongs to: a hash of its key, so that it needs no stored list."""
        digest = hashlib.sha256(f"{self.id}\n{self.split_key(pair)}".encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        return "held-out" if share < HELD_OUT_SHARE else "train"

    def pairs(self, split: Split, rng: Random) -> Iterator[Pair]:
        """Endless pairs of one side of the split; a pair may come more than once."""
        while True:
            pair = self.pair(rng)
            if self.split_of(pair) == split:
                yield pair


def held_out(task: Task, count: int) -> list[Example]:
    """The first `count` distinct held-out examples, the same ones on every call."""
    found: dict[str, Example] = {}
    for pair in task.pairs("held-out", Random(f"{task.id}/held-out")):
        example = task.example(pair)
        found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    return list(found.values())
