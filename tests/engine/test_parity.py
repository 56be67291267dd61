"""Nine different adapters and the base in one mixed batch, each equal to peft with that adapter alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from tests.engine.conftest import Zoo
from tests.engine.harness import assert_alone, random_prompt
from tests.support.models import ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mixed_batch_equals_each_adapter_alone(arch: str, zoo_of: Callable[[str], Zoo]) -> None:
    """Arrivals staggered, prompts longer than a chunk, sliding windows shorter than the prompts."""
    zoo = zoo_of(arch)
    driver = zoo.driver(max_num_batched_tokens=48, block_size=4)
    rng = random.Random(arch)
    arrivals = [*zoo.adapters, None, *rng.sample(sorted(zoo.adapters), 3), None]

    def arrive() -> None:
        if arrivals:
            driver.add(random_prompt(rng), arrivals.pop(0))

    driver.add(random_prompt(rng))
    driver.run(arrive)
    while arrivals:
        driver.run(arrive)
    assert driver.engine.stats().max_step_adapters == len(zoo.adapters)
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_adapter_changes_the_answers(arch: str, zoo_of: Callable[[str], Zoo]) -> None:
    """Otherwise parity would say nothing."""
    zoo = zoo_of(arch)
    prompt = list(range(3, 30))
    answers = {name: zoo.oracles[name].logits(prompt).log_softmax(-1) for name in [None, *zoo.adapters]}
    for one, other in itertools.combinations(answers, 2):
        assert (answers[one] - answers[other]).abs().max() > 0.1, f"{one} and {other} say the same"
