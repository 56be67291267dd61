"""LLaMA-Adapter beside LoRA, prefixes and the base, on the architectures that peft makes it for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from peft import AdaptionPromptConfig, PrefixTuningConfig

from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, assert_alone, random_prompt
from tests.support.adapters import PeftReference, make_adapter, make_lora
from tests.support.models import tiny_model

TASK = "CAUSAL_LM"
BASES = {
    "biases and groups": ("llama", {"head_dim": 12}),
    "one key head": ("llama", {"head_dim": 12, "num_key_value_heads": 1, "attention_bias": False}),
    "window": ("mistral", {"head_dim": 12}),
    "no groups": ("mistral", {"head_dim": 12, "num_key_value_heads": 4}),
    "fused": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}
CONFIGS = {
    "short": AdaptionPromptConfig(task_type=TASK, adapter_len=3, adapter_layers=1),
    "long": AdaptionPromptConfig(task_type=TASK, adapter_len=37, adapter_layers=3),
    "two": AdaptionPromptConfig(task_type=TASK, adapter_len=10, adapter_layers=2),
    "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=5),
}


@pytest.fixture(scope="module", params=BASES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    arch, overrides = BASES[request.param]
    folder = tmp_path_factory.mktemp(arch)
    base = tiny_model(arch, folder / "base", **overrides)
    adapters: dict[str, Path] = {
        name: make_adapter(base, folder / name, config, seed=seed, scale=2.0)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
    adapters["lora"] = make_lora(base, folder / "lora", target_modules="all-linear")
    return Zoo(base, adapters, Oracles(base, adapters))


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 24, "block_size": 4}], ids=["whole", "chunked"])
def test_mixed_rows_equal_peft_alone(settings: dict, zoo: Zoo) -> None:
    driver = zoo.driver(max_num_seqs=16, **settings)
    rng = random.Random(0)
    names = [*zoo.adapters, None]
    for index in range(12):
        driver.add(random_prompt(rng), names[index % len(names)], prompt_logprobs=0 if index % 4 == 0 else None)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


def test_every_adapter_changes_the_output(zoo: Zoo) -> None:
    prompt = random_prompt(random.Random(1))
    base = PeftReference(zoo.base).logits(prompt)
    for name in CONFIGS:
        assert float((zoo.oracles[name].logits(prompt) - base).abs().max()) > 0.02 * float(base.abs().max()), name


def test_slots_are_used_again(zoo: Zoo) -> None:
    """Two slots for five adapters: a prefix leaves nothing behind."""
    driver = zoo.driver(max_adapters=2)
    rng = random.Random(2)
    for name in (*zoo.adapters, None) * 2:
        driver.add(random_prompt(rng, 3, 12), name, max_tokens=4)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])
