"""LoTR, chains of LoRA, MiLoRA and models trained in full in one mixed batch, each request as its own model answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Driver, assert_alone, random_prompt
from tests.support.adapters import PeftReference, make_lora
from tests.support.models import tiny_model
from tests.support.own_formats import Made, load, make_chain, make_lotr, make_milora, make_relora
from tests.support.quantized import SETTINGS, QuantizedReference, wide_model
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine

LINKS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 6, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    {"r": 5, "use_rslora": True, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 2, "target_modules": "all-linear", "modules_to_save": ["norm", "o_proj"], "exclude_modules": ["o_proj"]},
]


def train(model: Any) -> None:
    """Norm, embedding and head beside what ReLoRA trains."""
    for name, rows in (("model.norm.weight", slice(None)), ("model.embed_tokens.weight", slice(0, 60, 2))):
        model.get_parameter(name)[rows] *= 1.3
    model.get_parameter("lm_head.weight").mul_(0.9)


@torch.no_grad()
def full(base: Path, folder: Path) -> Made:
    model = load(base)
    for number, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter += 0.1 * parameter.std() * noise
    model.save_pretrained(folder)
    return Made(folder, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("own") / "base")


@pytest.fixture(scope="module")
def made(base: Path) -> dict[str, Made]:
    lora = make_lora(base, base.with_name("lora"), target_modules="all-linear")
    return {
        "lotr": make_lotr(base, base.with_name("lotr")),
        "lotr-wide": make_lotr(base, base.with_name("lotr-wide"), ranks=(40, 60), whole=True),
        "chain": make_chain(base, base.with_name("chain"), LINKS),
        "chain-of-one": make_chain(base, base.with_name("one"), [{"r": 4, "target_modules": ["k_proj", "up_proj"]}]),
        "relora": make_relora(base, base.with_name("relora"), change=train),
        "relora-pickled": make_relora(base, base.with_name("pickled"), pickled=True, fields={"r": 2}),
        "full": full(base, base.with_name("full")),
        "milora": make_milora(base, base.with_name("milora")),
        "lora": Made(lora, base, lora),
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 24, "block_size": 4}, {"max_adapters": 2}],
    ids=["whole prompts", "chunked prefill", "two slots"],
)
def test_mixed_rows_equal_their_own_models(settings: dict[str, Any], base: Path, made: dict[str, Made]) -> None:
    engine = Engine(EngineConfig(str(base), **{"dtype": "float32", "max_adapters": 16, **settings}))
    for name, one in made.items():
        engine.register_adapter(name, one.folder)
    driver, rng = Driver(engine), random.Random(0)
    for index, name in enumerate([*made, None, *made]):
        driver.add(random_prompt(rng), name, prompt_logprobs=0 if index % 4 == 0 else None, max_tokens=16)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    oracles = {name: PeftReference(one.model, one.adapter) for name, one in made.items()}
    for stream in driver.streams.values():
        name = stream.request.adapter
        assert_alone(stream, oracles[name] if name else PeftReference(base))


def test_a_chain_on_a_quantised_base_is_all_links_at_once(tmp_path: Path) -> None:
    """Merging would quantise the sum anew, and lose the updates to rounding."""
    base = wide_model("llama", tmp_path / "base")
    links = [{"r": 3, "target_modules": ["q_proj", "v_proj"]}, {"r": 5, "target_modules": ["q_proj", "down_proj"]}]
    made = make_chain(base, tmp_path / "chain", links)
    engine = Engine(EngineConfig(str(base), dtype="float32", quantization="nf4"))
    engine.register_adapter("chain", made.folder)
    driver = Driver(engine)
    stream = driver.add(random_prompt(random.Random(0)), "chain", prompt_logprobs=0)
    driver.run()
    oracle = QuantizedReference(base, made.folder / "stage-0", **SETTINGS["nf4"])
    oracle.model.load_adapter(str(made.folder / "stage-1"), adapter_name="next")
    oracle.model.base_model.set_adapter(["default", "next"])
    assert_alone(stream, oracle)
