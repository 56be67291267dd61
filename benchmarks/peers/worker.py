"""The process of one system: its set-up comes in as a line of JSON, then a job on each line; raw times go out likewise.

Runs in environments of the peers, which have no weft: the standard library alone. The line of a job that was done is
``{"traces": [...]}``, one trace for each request, in seconds since the job began.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Setup:
    """What a system is started with.

    Attributes:
        adapters: folders by name.
        ranks: of each adapter, by name.
        max_num_seqs: rows decoding at once.
        max_model_len: tokens of prompt and output together.
        dtype: "bfloat16" or "float32".
        threads: of the computation.
    """

    model: str
    adapters: dict[str, str]
    ranks: dict[str, int]
    max_num_seqs: int
    max_model_len: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Request:
    """One request: ``model`` is an adapter's name, None the base; ``time`` is when it is due, in seconds."""

    time: float
    model: str | None
    prompt: list[int]
    max_tokens: int


@dataclass
class Trace:
    """What became of a request: when tokens came, how many at a time, and which."""

    arrival: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def record(self, now: float, tokens: Sequence[int]) -> None:
        if tokens:
            self.times.append(now)
            self.counts.append(len(tokens))
            self.tokens += tokens


class System(Protocol):
    """A system that is up; ``about`` has its versions and settings."""

    @property
    def about(self) -> dict[str, Any]: ...

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        """Run all to their end: ``concurrency`` at a time, or each at its own time if that is None."""
        ...


class Stepper(Protocol):
    """An engine that works in steps, on all requests it has been given."""

    def add(self, index: int, request: Request) -> None: ...

    def step(self) -> Iterable[tuple[int, Sequence[int], bool]]:
        """(which request, its new tokens, whether it has ended) of those that got any."""
        ...


def drive(engine: Stepper, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
    """``System.run`` for an engine that works in steps."""
    now = clock()
    waiting, traces = deque(enumerate(requests)), dict[int, Trace]()
    running = 0
    while waiting or running:
        while waiting and (waiting[0][1].time <= now() if concurrency is None else running < concurrency):
            index, request = waiting.popleft()
            traces[index] = Trace(now() if concurrency else request.time)
            engine.add(index, request)
            running += 1
        if not running:
            time.sleep(max(0.0, waiting[0][1].time - now()))
            continue
        for index, tokens, ended in engine.step():
            traces[index].record(now(), tokens)
            running -= ended
    return [traces[index] for index in range(len(requests))]


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def serve(start: Callable[[Setup], System]) -> None:
    """Start the system and do jobs until there are no more."""
    # Libraries print: what they print goes to stderr, and the channel is ours.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lines = _lines()
    system = start(Setup(**next(lines)))
    _say(channel, {"about": system.about})
    for job in lines:
        requests = [Request(**request) for request in job["requests"]]
        _say(channel, {"traces": [asdict(trace) for trace in system.run(requests, job["concurrency"])]})


def _lines() -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in sys.stdin)


def _say(channel: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=channel, flush=True)
