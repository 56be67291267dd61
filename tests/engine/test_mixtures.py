"""Mixtures of experts: the base as transformers alone, adapters of every part as peft alone, in one mixed batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, Stream, assert_alone, random_prompt
from tests.engine.mixtures import mixture_variants
from tests.support.adapters import make_lora
from tests.support.models import MIXTURES, tiny_model

CHUNKED = {"max_num_batched_tokens": 24, "block_size": 4}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    @cache
    def make(arch: str) -> Zoo:
        folder = tmp_path_factory.mktemp(arch)
        base = tiny_model(arch, folder / "base")
        adapters = {
            name: make_lora(base, folder / name, seed=seed, **config)
            for seed, (name, config) in enumerate(mixture_variants(arch).items())
        }
        return Zoo(base, adapters, Oracles(base, adapters))

    return make


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_base_equals_transformers(arch: str, mixture: Callable[[str], Zoo]) -> None:
    """Whole prompts and chunks; the second round finds its prompts in the prefix cache."""
    zoo = mixture(arch)
    for settings in ({}, CHUNKED):
        driver, rng = zoo.driver(**settings), random.Random(0)
        prompts = [random_prompt(rng, 20, 40) for _ in range(3)]
        for _ in range(2):
            for prompt in prompts:
                driver.add(prompt, max_tokens=25)
            driver.run()
        assert driver.engine.stats().prefix_cache_hits > 0
        for stream in driver.streams.values():
            assert_alone(stream, zoo.oracles[None], 1e-4)


@pytest.mark.parametrize("settings", [{}, CHUNKED], ids=["whole prompts", "chunked prefill"])
@pytest.mark.parametrize("arch", MIXTURES)
def test_mixed_batch_equals_each_adapter_alone(arch: str, settings: dict, mixture: Callable[[str], Zoo]) -> None:
    zoo = mixture(arch)
    driver, rng = zoo.driver(**settings), random.Random(1)
    for name in (*zoo.adapters, None, *zoo.adapters):
        driver.add(random_prompt(rng, 8, 40), name, max_tokens=10, prompt_logprobs=0)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter], 1e-4)


@pytest.mark.parametrize("arch", MIXTURES)
def test_every_adapter_changes_the_answers(arch: str, mixture: Callable[[str], Zoo]) -> None:
    zoo = mixture(arch)
    prompt = list(range(3, 30))
    answers = {name: zoo.oracles[name].logits(prompt).log_softmax(-1) for name in [None, *zoo.adapters]}
    for one, other in itertools.combinations(answers, 2):
        assert (answers[one] - answers[other]).abs().max() > 0.1, f"{one} and {other} say the same"


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_base_row_does_not_depend_on_its_batch(arch: str, mixture: Callable[[str], Zoo]) -> None:
    zoo = mixture(arch)
    prompt = random_prompt(random.Random(2), 20, 30)
    streams: list[Stream] = []
    for others in ([], [None] * 3, [*zoo.adapters]):
        driver, rng = zoo.driver(), random.Random(3)
        for name in others:  # all of them in their slots first, so that all rows start in one step
            driver.add([3], name, max_tokens=1)
        driver.run()
        streams.append(driver.add(prompt, None, max_tokens=12, prompt_logprobs=0))
        for name in others:
            driver.add(random_prompt(rng, 8, 30), name, max_tokens=12)
        driver.run()
    alone, *mixed = (
        torch.tensor([e.logprob for e in [*(s.prompt_logprobs or [])[1:], *s.logprobs] if e]) for s in streams
    )
    for row in mixed:
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    assert streams[0].tokens == streams[1].tokens == streams[2].tokens


def test_slots_are_used_again(mixture: Callable[[str], Zoo]) -> None:
    """Experts of several ranks come and go in two slots; nothing of the last one is left."""
    zoo = mixture("mixtral")
    driver, rng = zoo.driver(max_adapters=2), random.Random(4)
    names = ["down", "gate-up", "all", "experts", "short-names", "router"]
    for name in [*names, *rng.sample(names, 6)]:
        driver.add(random_prompt(rng, 5, 20), name, max_tokens=4)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter], 1e-4)
