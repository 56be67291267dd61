"""Prefix tuning, prompt tuning and P-tuning in a mixed batch: computed once, shared, evicted, never mixed up."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import (
    CartridgeConfig,
    CPTConfig,
    LNTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers import AutoModelForCausalLM

from tests.engine.conftest import Zoo
from tests.engine.harness import Driver, Oracles, assert_alone, random_prompt
from tests.support.adapters import make_adapter, make_lora
from tests.support.models import ARCHITECTURES, tiny_model
from weft.adapters.base import Base
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.errors import InvalidRequest

TASK = "CAUSAL_LM"


def prompt_configs() -> dict[str, PeftConfig]:
    """Lengths below, at and above a page of 16."""
    return {
        "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=21),
        "prefix-projected": PrefixTuningConfig(
            task_type=TASK, num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=24
        ),
        "cartridge": CartridgeConfig(task_type=TASK, num_virtual_tokens=9, num_frozen_tokens=1),
        "cpt": CPTConfig(task_type=TASK, cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4]),
        "prompt": PromptTuningConfig(task_type=TASK, num_virtual_tokens=35),
        "prefix-saved": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=5, modules_to_save=["1.mlp", "lm_head"]),
        "prompt-saved": PromptTuningConfig(task_type=TASK, num_virtual_tokens=18, modules_to_save=["lm_head"]),
        "p-tuning": PromptEncoderConfig(task_type=TASK, num_virtual_tokens=7, encoder_hidden_size=24),
        "p-tuning-lstm": PromptEncoderConfig(
            task_type=TASK, num_virtual_tokens=32, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"
        ),
    }


ELSEWHERE = ("prefix", "prefix-projected", "prompt", "p-tuning")
"""Those made for other architectures than Llama: once compiled, the others are as these are."""


@pytest.fixture(scope="module")
def prompts_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    made: dict[str, Zoo] = {}

    def make(arch: str) -> Zoo:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            base = tiny_model(arch, folder / "base")
            adapters = {
                name: make_adapter(base, folder / name, config, seed=seed, scale=3.0)
                for seed, (name, config) in enumerate(prompt_configs().items())
                if arch == "llama" or name in ELSEWHERE
            }
            norms = list(Base.of(AutoModelForCausalLM.from_pretrained(base)).norms)
            adapters["norms"] = make_adapter(
                base, folder / "norms", LNTuningConfig(task_type=TASK, target_modules=norms)
            )
            adapters["lora"] = make_lora(base, folder / "lora", r=3, target_modules="all-linear")
            made[arch] = Zoo(base, adapters, Oracles(base, adapters))
        return made[arch]

    return make


@pytest.fixture
def llama(prompts_of: Callable[[str], Zoo]) -> Zoo:
    return prompts_of("llama")


def run_mixed(zoo: Zoo, driver: Driver, requests: int = 14, seed: int = 0) -> None:
    """Requests of all adapters and the base, arriving while others decode, each as peft alone."""
    rng = random.Random(seed)
    names = [*zoo.adapters, None]
    for index in range(requests):
        driver.add(random_prompt(rng), names[index % len(names)], prompt_logprobs=1 if index % 5 == 0 else None)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_equals_peft(arch: str, prompts_of: Callable[[str], Zoo]) -> None:
    zoo = prompts_of(arch)
    run_mixed(zoo, zoo.driver(), requests=len(zoo.adapters) + 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 6},
        {"enable_prefix_caching": False},
        {"block_size": 4},
        {"block_size": 64},
        {"kv_cache_memory": 190_000, "max_model_len": 110},
    ],
    ids=str,
)
def test_every_mode_equals_peft(settings: dict, llama: Zoo) -> None:
    driver = llama.driver(**settings)
    run_mixed(llama, driver, requests=21, seed=1)


def test_a_prompt_is_computed_once_for_all_its_requests(llama: Zoo) -> None:
    driver = llama.driver()
    rng = random.Random(2)
    for _ in range(3):
        for _ in range(4):
            driver.add(random_prompt(rng), "prompt")
        driver.run()
    assert driver.engine.stats().adapter_prompt_tokens == 35
    before = driver.engine.stats().batch_tokens
    driver.add([5, 6, 7], "prompt", max_tokens=1)
    driver.run()
    assert driver.engine.stats().batch_tokens == before + 3


def test_requests_behind_a_prompt_share_a_cached_prefix(llama: Zoo) -> None:
    driver = llama.driver()
    shared = random_prompt(random.Random(3), 40, 45)
    for name in ("prompt", "prefix"):
        first = driver.add(shared, name)
        driver.run()
        hits = driver.engine.stats().prefix_cache_hits
        second = driver.add([*shared, 9, 8], name)
        driver.run()
        # Pages of 16, the first of which begins with the tail of the prompt: 35 % 16 = 3, 21 % 16 = 5.
        assert driver.engine.stats().prefix_cache_hits - hits == {"prompt": 29, "prefix": 27}[name]
        for stream in (first, second):
            assert_alone(stream, llama.oracles[name])


def test_pages_return_when_adapters_go(llama: Zoo) -> None:
    driver = llama.driver()
    for name in llama.adapters:
        driver.add([5, 6, 7], name)
    driver.run()
    assert driver.engine.stats().blocks_used == 2 + 1 + 1 + 1 + 3 + 1 + 2 + 1 + 2
    for name in llama.adapters:
        driver.engine.unregister_adapter(name)
    driver.engine.poll()
    driver.engine.check_integrity()
    assert driver.engine.stats().blocks_used == 0


def test_the_adapters_own_tokens_count_against_the_context(llama: Zoo) -> None:
    engine = llama.engine(max_model_len=60)
    driver = Driver(engine)
    driver.add([5] * 20, "prompt", max_tokens=5)
    with pytest.raises(InvalidRequest, match="beside the adapter's own 35"):
        driver.add([5] * 25, "prompt", max_tokens=1)
    with pytest.raises(InvalidRequest, match="leaves 5 of 60"):
        driver.add([5] * 20, "prompt", max_tokens=6)
    driver.run()


@pytest.mark.parametrize("name", ["prompt", "prefix-projected"])
def test_the_longest_request_fits_a_cache_of_one_row(name: str, llama: Zoo) -> None:
    """The page a prompt ends in is there twice, once for the adapter and once for the row."""
    page = 2 * 3 * 2 * 20 * 4 * 16
    driver = llama.driver(kv_cache_memory=5 * page, max_model_len=80)
    own, room = (35, 64) if name == "prompt" else (16, 80)
    with pytest.raises(InvalidRequest, match=f"of {room}"):
        driver.add([5] * 9, name, max_tokens=room - own - 8)
    stream = driver.add([5] * 9, name, max_tokens=room - own - 9)
    driver.run()
    assert_alone(stream, llama.oracles[name])


def test_a_prefix_of_another_base_is_refused(llama: Zoo, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "base", num_hidden_layers=2, hidden_size=64)
    engine = Engine(EngineConfig(str(other), dtype="float32"))
    for name in ("prefix", "prompt"):
        with pytest.raises(Exception, match="prompt_embeddings"):
            engine.register_adapter(name, llama.adapters[name])
