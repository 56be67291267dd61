"""What is measured: models, sets of adapters, loads, and which systems take part in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from weft.server.bench.workload import Workload

SYSTEMS = ("weft", "weft-http", "vllm", "peft", "transformers", "llama.cpp")
ENGINES = ("weft", "vllm", "peft", "llama.cpp")
"""Those that serve adapters, without HTTP."""
Role = Literal["burst", "load", "http"]
MIXED_RANKS = (8, 16, 64)


@dataclass(frozen=True)
class AdapterSet:
    """Adapters that all systems are started with.

    Attributes:
        model: "llama-125m" (random weights) or "demo".
        ranks: one per adapter; none: the base alone, with LoRA off where that can be chosen. The demo has its own.
    """

    name: str
    model: str = "llama-125m"
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One load on one set of adapters.

    Attributes:
        mixed: requests go to the adapters in turn; else to the base.
        rate: arrivals per second, a Poisson process; None: all at once, ``streams`` at a time.
    """

    adapters: AdapterSet
    mixed: bool
    prompt_tokens: int
    output_tokens: int
    requests: int
    streams: int
    rate: float | None = None
    systems: tuple[str, ...] = ENGINES

    @property
    def role(self) -> Role:
        """What it is there for: throughput of a burst, latencies under load, or the cost of HTTP."""
        if self.rate is not None:
            return "load"
        return "burst" if "peft" in self.systems else "http"

    @property
    def name(self) -> str:
        model = "mixed" if self.mixed else "base"
        load = f"{self.streams} streams" if self.rate is None else f"{self.rate:g}/s"
        return f"{self.adapters.name}, {model}, {self.prompt_tokens}/{self.output_tokens}, {load}"

    def workload(self, vocab_size: int, seed: int) -> Workload:
        """Its requests; other seeds have other prompts, so that no repetition finds those of another cached."""
        return Workload(
            num_requests=self.requests,
            popularity="distinct",
            rate=self.rate,
            concurrency=self.streams,
            prompt_tokens=(self.prompt_tokens, self.prompt_tokens),
            output_tokens=(self.output_tokens, self.output_tokens),
            vocab_size=vocab_size,
            seed=seed,
        )

    def warm_up(self) -> Case:
        """As many rows and tokens as will be measured, for a few steps."""
        return replace(self, output_tokens=min(4, self.output_tokens), requests=self.streams, rate=None)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    rows: int = 32
    prompts: tuple[int, ...] = (64, 512)
    output_tokens: int = 64
    counts: tuple[int, ...] = (1, 8, 32)
    rate: float = 2.0
    arrivals: int = 96
    http_streams: int = 64
    demo: bool = True


QUICK = Size(rows=8, prompts=(64,), output_tokens=16, counts=(8,), arrivals=8, http_streams=16, demo=False)

BASE = AdapterSet("no adapters")
DEMO = AdapterSet("demo", model="demo")


def uniform(count: int) -> AdapterSet:
    """``count`` adapters of rank 16."""
    return AdapterSet(f"{count} of rank 16", ranks=(16,) * count)


def mixed(count: int) -> AdapterSet:
    """``count`` adapters, of ranks 8, 16 and 64 in turn."""
    return AdapterSet(f"{count} of ranks 8, 16, 64", ranks=tuple(MIXED_RANKS[i % 3] for i in range(count)))


TARGET = uniform(8)
"""The set that the targets are about."""


def plan(size: Size) -> list[Case]:
    """Every case, those of a set of adapters next to each other."""
    base = Case(
        BASE, False, size.prompts[0], size.output_tokens, size.rows, size.rows, systems=(*ENGINES, "transformers")
    )
    cases = [replace(base, prompt_tokens=tokens) for tokens in size.prompts]
    cases.append(under_load(base, size))
    for adapters in [uniform(count) for count in size.counts] + [mixed(count) for count in size.counts if count > 1]:
        for tokens in size.prompts:
            both = [
                replace(base, adapters=adapters, mixed=m, prompt_tokens=tokens, systems=ENGINES) for m in (False, True)
            ]
            cases += [replace(case, systems=_with_http(case)) for case in both]
        if adapters == TARGET:
            cases.append(under_load(cases[-1], size))
            cases += through_http(replace(base, adapters=adapters), size)
    if size.demo:
        cases += [replace(base, adapters=DEMO, mixed=m, systems=ENGINES) for m in (False, True)]
    return cases


def under_load(case: Case, size: Size) -> Case:
    """The shortest prompts, one after the other."""
    return replace(case, prompt_tokens=size.prompts[0], requests=size.arrivals, rate=size.rate)


def through_http(case: Case, size: Size) -> list[Case]:
    """What HTTP costs: as many streams as given, twice as many requests."""
    many = replace(case, streams=size.http_streams, requests=2 * size.http_streams, systems=("weft", "weft-http"))
    return [replace(many, mixed=m) for m in (False, True)]


def _with_http(case: Case) -> tuple[str, ...]:
    return (*case.systems, "weft-http") if case.adapters == TARGET and case.mixed else case.systems


def sets(cases: Sequence[Case]) -> list[AdapterSet]:
    """The sets of adapters of ``cases``, in their order."""
    return list(dict.fromkeys(case.adapters for case in cases))
