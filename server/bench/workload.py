"""Seeded traffic: which adapter each request asks for, when it arrives, and how long it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from weft.kernels.testing import Popularity as Punica
from weft.kernels.testing import sample_slots
from weft.server.config import ConfigError

Popularity = Punica | Literal["zipf", "power"]
"""How requests are spread over adapters: Punica's four patterns, Zipf's law, and S-LoRA's power law."""


@dataclass(frozen=True)
class Arrival:
    """One request of the workload.

    Attributes:
        time: when it is due, in seconds from the start; 0 in a closed loop.
        model: name of an adapter or the base.
        prompt: token ids.
        max_tokens: it generates exactly this many.
    """

    time: float
    model: str
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """What to sample. S-LoRA's trace, its lengths included, is ``Workload(popularity="power", alpha=0.1, rate=2.0)``.

    Attributes:
        popularity: Punica's patterns take their number of adapters from that of the requests; where there are fewer,
            they are used in turn.
        alpha: Zipf: the i-th most popular adapter has weight i^-α. Power: an adapter's quantile has the density
            α x^(α-1) on [0, 1] (Sheng et al. 2023, section 7), so the smaller α, the more skewed.
        rate: arrivals per second, Gamma-distributed gaps of mean 1/rate (open loop); None: closed loop.
        cv: coefficient of variation of the gaps; 1 is a Poisson process, more is burstier.
        concurrency: requests in flight in a closed loop.
        prompt_tokens, output_tokens: bounds, both included, of uniformly drawn lengths.
        vocab_size: prompts are random token ids below it, so no two share a prefix worth caching.

    Raises:
        ConfigError: a field makes no sense; the message names it.
    """

    num_requests: int = 64
    popularity: Popularity = "uniform"
    alpha: float = 1.0
    rate: float | None = None
    cv: float = 1.0
    concurrency: int = 16
    prompt_tokens: tuple[int, int] = (8, 512)
    output_tokens: tuple[int, int] = (8, 512)
    vocab_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "alpha", "cv", "concurrency", "vocab_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"rate must be positive, got {self.rate}")
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"{name} must be bounds LOW:HIGH with 1 <= LOW <= HIGH, got {low}:{high}")

    def sample(self, models: Sequence[str]) -> list[Arrival]:
        """The requests in order of arrival, over ``models`` from the most popular down. Equal seeds, equal requests."""
        rng = np.random.default_rng(self.seed)
        chosen = self._choose(rng, len(models))
        times = np.zeros(self.num_requests) if self.rate is None else self._times(rng, self.rate)
        prompts = rng.integers(*self.prompt_tokens, self.num_requests, endpoint=True)
        outputs = rng.integers(*self.output_tokens, self.num_requests, endpoint=True)
        return [
            Arrival(
                float(times[i]),
                models[chosen[i]],
                rng.integers(0, self.vocab_size, int(prompts[i])).tolist(),
                int(outputs[i]),
            )
            for i in range(self.num_requests)
        ]

    def _times(self, rng: np.random.Generator, rate: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        # Gamma with shape 1/cv² and scale cv²/rate has mean 1/rate and coefficient of variation cv.
        return np.cumsum(rng.gamma(1 / self.cv**2, self.cv**2 / rate, self.num_requests))

    def _choose(self, rng: np.random.Generator, models: int) -> Sequence[int]:
        """The index of each request's model."""
        if self.popularity == "zipf":
            weights = np.arange(1, models + 1, dtype=np.float64) ** -self.alpha
            return [int(i) for i in rng.choice(models, self.num_requests, p=weights / weights.sum())]
        if self.popularity == "power":
            return [min(int(x * models), models - 1) for x in rng.power(self.alpha, self.num_requests)]
        return [slot % models for slot in sample_slots(self.popularity, self.num_requests, rng)]
