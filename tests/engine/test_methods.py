"""Every method in one mixed batch, each request as peft runs its adapter alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.adapters.cases import all_cases, all_gpt2_cases, chosen_of
from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, assert_alone, random_prompt
from tests.engine.test_prompts import prompt_configs
from tests.engine.variants import lora_variants
from tests.support.adapters import make_adapter, make_lora
from tests.support.models import tiny_model


def two_of_each() -> dict[str, PeftConfig]:
    """The first and the last case of every method."""
    cases = all_cases()
    names: dict[str, list[str]] = {}
    for name, config in cases.items():
        names.setdefault(config.peft_type, []).append(name)
    return {name: cases[name] for own in names.values() for name in (own[0], own[-1])}


CONFIGS: dict[str, tuple[str, Callable[[], dict[str, PeftConfig]]]] = {
    "llama": ("llama", all_cases),
    "llama, two of each": ("llama", two_of_each),
    "gpt2": ("gpt2", all_gpt2_cases),
}


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    arch, configs = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(f"all-{arch}")
    base = tiny_model(arch, folder / "base")
    adapters: dict[str, Path] = {}
    chosen: dict[str, dict[str, int]] = {}
    for seed, (name, config) in enumerate(configs().items()):
        adapters[name] = make_adapter(base, folder / name, config, seed=seed)
        chosen[name] = chosen_of(config)
    for name, config in prompt_configs().items():
        adapters[name] = make_adapter(base, folder / name, config, scale=3.0)
    for name, fields in lora_variants(arch).items():
        adapters[f"lora-{name}"] = make_lora(base, folder / f"lora-{name}", **fields)
    tasks = {name: choices["task_id"] for name, choices in chosen.items() if choices}
    return Zoo(base, adapters, Oracles(base, adapters, tasks), chosen)


# On Llama, tests/cli/test_one_batch.py asks for all of them over HTTP.
@pytest.mark.parametrize("everything", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"], indirect=True)
@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 512, "block_size": 8}], ids=["whole prompts", "chunked prefill"]
)
def test_all_methods_in_one_batch_equal_peft(settings: dict, everything: Zoo) -> None:
    count = len(everything.adapters) + 1
    driver = everything.driver(max_adapters=count, max_num_seqs=count, adapter_memory=1 << 28, **settings)
    rng = random.Random(0)
    for name in (*everything.adapters, None):
        driver.add(random_prompt(rng, 8, 40), name, everything.choices.get(name or ""), max_tokens=25)
    driver.run()
    assert driver.engine.stats().max_step_adapters == count - 1
    for stream in driver.streams.values():
        assert_alone(stream, everything.oracles[stream.request.adapter])


@pytest.mark.parametrize("everything", ["llama, two of each", "gpt2"], indirect=True)
def test_a_base_row_does_not_see_the_others(everything: Zoo) -> None:
    """Bit-equal beside adapters of every form and beside base rows alone, where the shapes are the same."""
    prompts = [n for n in everything.adapters if n in prompt_configs()]
    names = [name for name in everything.adapters if name not in prompts]
    streams = []
    for others in ([None] * len(names), names):
        driver = everything.driver(max_adapters=len(names), max_num_seqs=99, adapter_memory=1 << 26)
        if others == names:  # all of them in their slots first, so that all rows start in one step
            for name in names:
                driver.add([3], name, everything.choices.get(name), max_tokens=1)
            driver.run()
        rng = random.Random(1)
        stream = driver.add(random_prompt(rng, 20, 30), None, max_tokens=12, prompt_logprobs=0)
        for other in others:
            driver.add(random_prompt(rng, 8, 30), other, everything.choices.get(other or ""), max_tokens=12)
        driver.run()
        streams.append(stream)
    alone, mixed = streams
    assert alone.tokens == mixed.tokens
    assert [entry.logprob for entry in alone.logprobs] == [entry.logprob for entry in mixed.logprobs]
    assert alone.prompt_logprobs == mixed.prompt_logprobs
