"""The workload sampler: seeded, and distributed as it says."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from weft.server.bench.workload import Popularity, Workload
from weft.server.config import ConfigError

MODELS = [f"a{i}" for i in range(10)]


def shares(
    popularity: Popularity, *, models: list[str] = MODELS, alpha: float = 1.0, requests: int = 4000
) -> list[float]:
    workload = Workload(num_requests=requests, popularity=popularity, alpha=alpha, prompt_tokens=(1, 1))
    counts = Counter(arrival.model for arrival in workload.sample(models))
    return [counts[model] / requests for model in models]


def test_equal_seeds_give_equal_requests() -> None:
    workload = Workload(rate=3.0, seed=7)
    assert workload.sample(MODELS) == workload.sample(MODELS)
    assert workload.sample(MODELS) != replace(workload, seed=8).sample(MODELS)


def test_the_models_do_not_change_lengths_and_times() -> None:
    workload = Workload(rate=3.0)
    one, many = workload.sample(["base"]), workload.sample(MODELS)
    assert [(a.time, a.prompt, a.max_tokens) for a in one] == [(a.time, a.prompt, a.max_tokens) for a in many]


def test_lengths_are_within_bounds_and_reach_them() -> None:
    arrivals = Workload(num_requests=2000, prompt_tokens=(3, 9), output_tokens=(1, 4), vocab_size=50).sample(["m"])
    assert {len(a.prompt) for a in arrivals} == set(range(3, 10))
    assert {a.max_tokens for a in arrivals} == {1, 2, 3, 4}
    assert {token for a in arrivals for token in a.prompt} == set(range(50))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_burstiness(cv: float) -> None:
    arrivals = Workload(num_requests=20000, rate=5.0, cv=cv, prompt_tokens=(1, 1)).sample(["m"])
    gaps = np.diff([0.0, *(a.time for a in arrivals)])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_a_closed_loop_has_no_times() -> None:
    assert {arrival.time for arrival in Workload().sample(MODELS)} == {0.0}


def test_punicas_patterns() -> None:
    assert shares("distinct") == [0.1] * 10
    assert shares("identical") == [1.0] + [0.0] * 9
    assert shares("uniform") == pytest.approx([0.1] * 10, abs=0.03)
    skewed = shares("skewed", models=[f"a{i}" for i in range(40)])
    assert skewed[:4] == pytest.approx([1.5**-i / 3 for i in range(4)], abs=0.03)


def test_zipf() -> None:
    weights = np.arange(1, 11) ** -1.5
    assert shares("zipf", alpha=1.5) == pytest.approx(list(weights / weights.sum()), abs=0.03)


def test_the_power_law_is_s_loras() -> None:
    # P(quantile < x) = x^α
    expected = np.diff((np.arange(11) / 10) ** 0.3)
    assert shares("power", alpha=0.3) == pytest.approx(list(expected), abs=0.03)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_requests": 0}, "num_requests"),
        ({"rate": -1.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"cv": 0.0}, "cv"),
        ({"alpha": 0.0}, "alpha"),
        ({"concurrency": 0}, "concurrency"),
        ({"prompt_tokens": (5, 4)}, "prompt_tokens"),
        ({"output_tokens": (0, 4)}, "output_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must"):
        replace(Workload(), **fields)  # type: ignore[arg-type]
