"""Side networks beside LoRA, prefixes and the base: keys and values of their own in the pages of the base's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, ShadowConfig

from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, assert_alone, random_prompt
from tests.support.adapters import PeftReference, make_adapter, make_lora
from tests.support.models import ARCHITECTURES, MIXTURES, tiny_model
from weft.adapters.errors import AdapterTooLarge, AdapterUnsupported

TASK = "CAUSAL_LM"


def side(**fields: Any) -> ShadowConfig:
    return ShadowConfig(**{"task_type": TASK, "r": 4, "shadow_alpha": 1.5, **fields})


CONFIGS = {
    "plain": side(),
    "deep": side(shadow_num_hidden_layers=2, share_embeddings=False),
    "narrow": side(shadow_hidden_size=24, update_hidden_size=7),
    "some": side(target_modules=r".*(layers|h)\.[12]", r=2),
    "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=5),
}


@pytest.fixture(scope="module")
def zoo_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    made: dict[str, Zoo] = {}

    def make(arch: str) -> Zoo:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            base = tiny_model(arch, folder / "base")
            left_out = {"llama": (), "opt": ("prefix", "narrow")}.get(
                arch, ("prefix",)
            )  # see test_what_peft_cannot_run
            chosen = {name: config for name, config in CONFIGS.items() if name not in left_out}
            adapters: dict[str, Path] = {
                name: make_adapter(base, folder / name, config, seed=seed, scale=3.0 if name == "prefix" else 0.3)
                for seed, (name, config) in enumerate(chosen.items())
            }
            adapters["lora"] = make_lora(base, folder / "lora", target_modules="all-linear")
            made[arch] = Zoo(base, adapters, Oracles(base, adapters))
        return made[arch]

    return make


@pytest.fixture
def llama(zoo_of: Callable[[str], Zoo]) -> Zoo:
    return zoo_of("llama")


def run_mixed(zoo: Zoo, count: int, **settings: Any) -> Any:
    """Staggered requests to all adapters and the base, all equal to peft alone; returns the engine."""
    driver = zoo.driver(max_num_seqs=16, **settings)
    rng = random.Random(0)
    names = [*zoo.adapters, None]
    for index in range(count):
        driver.add(random_prompt(rng), names[index % len(names)], prompt_logprobs=0 if index % 4 == 0 else None)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])
    return driver.engine


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 24, "block_size": 4}], ids=["whole", "chunked"])
def test_mixed_rows_equal_peft_alone(settings: dict, llama: Zoo) -> None:
    run_mixed(llama, 21, **settings)


@pytest.mark.parametrize("arch", [*(arch for arch in ARCHITECTURES if arch != "llama"), *MIXTURES])
def test_every_architecture_equals_peft(arch: str, zoo_of: Callable[[str], Zoo]) -> None:
    run_mixed(zoo_of(arch), 8, max_num_batched_tokens=32, block_size=4)


def test_slots_and_pages_are_used_again(llama: Zoo) -> None:
    """Two slots for six adapters and pages for two long rows: eviction, reload and preemption."""
    driver = llama.driver(max_adapters=2, kv_cache_memory=48 * 4 * 960, block_size=4, enable_prefix_caching=True)
    rng = random.Random(2)
    for name in (*llama.adapters, None) * 3:
        driver.add(random_prompt(rng, 20, 40), name, max_tokens=30)
    driver.run()
    assert driver.engine.adapters.evictions and driver.engine.stats().preemptions
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


def test_pages_are_found_again_after_the_slot_was_another_s(llama: Zoo) -> None:
    driver = llama.driver(max_adapters=1, block_size=4)
    prompt = random_prompt(random.Random(3), 30, 31)
    first = driver.add(prompt, "plain")
    driver.run()
    for name in ("narrow", "lora"):  # a side network of another shape, and none
        driver.add(prompt, name)
        driver.run()
    again = driver.add([*prompt, 7, 8], "plain")
    driver.run()
    assert again.last is not None and driver.engine.stats().prefix_cache_hits > 0
    for stream in (first, again):
        assert_alone(stream, llama.oracles["plain"])


def test_an_adapter_without_room_for_its_keys_and_values_is_refused(llama: Zoo) -> None:
    """Its weights would fit; the pages are many."""
    empty = Zoo(llama.base, {}, llama.oracles)
    engine = empty.engine(adapter_memory=1 << 21, kv_cache_memory=1 << 28, max_num_seqs=1024)
    with pytest.raises(AdapterTooLarge, match="--adapter-memory") as caught:
        engine.register_adapter("plain", llama.adapters["plain"])
    assert caught.value.param == "adapter_memory" and "keys and values" in caught.value.message
    engine.poll()
    assert not engine.adapters.knows("plain") and engine.runner.side.tensors() == []
    engine.register_adapter("lora", llama.adapters["lora"])


def test_keys_and_values_are_given_back_with_the_last_adapter(llama: Zoo) -> None:
    """And an adapter that comes again does not find the pages of before."""
    driver = llama.driver(block_size=4)
    engine, prompt = driver.engine, random_prompt(random.Random(6), 30, 31)
    first = driver.add(prompt, "narrow")
    driver.run()
    count = len(engine.runner.side.tensors())
    for name in ("narrow", "some"):  # the shape of its keys is another one's too
        engine.unregister_adapter(name)
        driver.run()
        engine.poll()
    assert len(engine.runner.side.tensors()) == count
    for name in ("plain", "deep"):
        engine.unregister_adapter(name)
        engine.poll()
    assert engine.runner.side.tensors() == []
    engine.register_adapter("narrow", llama.adapters["narrow"])
    again = driver.add(prompt, "narrow")
    driver.run()
    assert len(engine.runner.side.tensors()) == 2 and engine.stats().prefix_cache_hits == 0
    for stream in (first, again):
        assert_alone(stream, llama.oracles["narrow"])


def test_what_peft_cannot_run(tmp_path: Path) -> None:
    """OPT's stack gives out vectors as wide as the base's embedding, not as the network."""
    base = tiny_model("opt", tmp_path / "base")
    folder = make_adapter(base, tmp_path / "narrow", CONFIGS["narrow"])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        PeftReference(base, folder).logits([3, 4])
    engine = Zoo(base, {}, Oracles(base, {})).engine()
    with pytest.raises(AdapterUnsupported, match="does not run"):
        engine.register_adapter("narrow", folder)


def test_what_is_not_a_number_is_scrubbed(llama: Zoo) -> None:
    engine = llama.engine()
    tensors = engine.runner.side.tensors()
    assert len(tensors) == 4, "keys and values of two layers, the most that an adapter has"
    for tensor in tensors:
        tensor[3] = float("nan")
    engine.runner.scrub([3])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_rows_of_others_are_left_alone(llama: Zoo) -> None:
    """A base row is bit-equal beside side networks and beside base rows alone."""
    answers = []
    for other in (None, "deep"):
        driver = llama.driver()
        driver.add([3], other, max_tokens=1)
        driver.run()
        prompt = random_prompt(random.Random(4), 20, 21)
        stream = driver.add(prompt, None, prompt_logprobs=0)
        driver.add(prompt, other)
        driver.run()
        answers.append((stream.tokens, [entry.logprob for entry in stream.logprobs], stream.prompt_logprobs))
    assert answers[0] == answers[1]


def test_16_bits(tmp_path: Path) -> None:
    """As near to peft in fp32 as 16 bits allow, and nearer than the base by far."""
    base = tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    adapters = {name: make_adapter(base, tmp_path / name, CONFIGS[name]) for name in ("plain", "narrow")}
    zoo = Zoo(base, adapters, Oracles(base, adapters))
    driver = zoo.driver(dtype="bfloat16")
    for name in adapters:
        prompt = random_prompt(random.Random(5), 20, 21)
        stream = driver.add(prompt, name, max_tokens=1, prompt_logprobs=0)
        driver.run()
        given = torch.tensor([entry.logprob for entry in (stream.prompt_logprobs or [])[1:] if entry is not None])
        alone = zoo.oracles[name].logits(prompt).log_softmax(-1)[:-1]
        expected = alone.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        plain = zoo.oracles[None].logits(prompt).log_softmax(-1)[:-1]
        plain = plain.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        assert 20 * float((given - expected).abs().mean()) < float((plain - expected).abs().mean())
