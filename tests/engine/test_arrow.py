"""Arrow's routers beside LoRA and the base: every row finds its own experts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from peft import ArrowConfig

from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, assert_alone, random_prompt
from tests.support.adapters import make_arrow, make_lora
from tests.support.models import tiny_model

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
ARROWS = {
    "one": (ArrowConfig(top_k=1, rng_seed=1), 2),
    "two": (ArrowConfig(top_k=2, router_temperature=0.3, rng_seed=2), 5),
    "all": (ArrowConfig(top_k=3, router_temperature=2.0, rng_seed=3), 3),
    "general": (ArrowConfig(top_k=2, rng_seed=4, use_gks=True), 3),
}


@pytest.fixture(scope="module", params=TARGETS)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    arch: str = request.param
    folder = tmp_path_factory.mktemp(arch)
    base = tiny_model(arch, folder / "base")
    adapters: dict[str, Path] = {
        name: make_arrow(base, folder / name, arrow, experts=experts, r=3, scale=2.0, target_modules=TARGETS[arch])
        for name, (arrow, experts) in ARROWS.items()
    }
    adapters["lora"] = make_lora(base, folder / "lora", target_modules="all-linear")
    return Zoo(base, adapters, Oracles(base, adapters))


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 24, "block_size": 4}, {"max_adapters": 2}],
    ids=["whole", "chunked", "two slots"],
)
def test_mixed_rows_equal_peft_alone(settings: dict, zoo: Zoo) -> None:
    driver = zoo.driver(max_num_seqs=16, **settings)
    rng = random.Random(0)
    names = [*zoo.adapters, None]
    for index in range(10):
        driver.add(random_prompt(rng), names[index % len(names)], prompt_logprobs=0 if index % 4 == 0 else None)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])
