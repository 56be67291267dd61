"""Adapters on a base in 4 or 8 bits, in one mixed batch, each request as peft runs its adapter alone on that base."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import bitsandbytes.nn.modules
import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig

from tests.adapters.cases import all_cases
from tests.engine.harness import Driver, assert_alone, random_prompt
from tests.engine.variants import lora_variants
from tests.support.adapters import make_adapter, make_lora
from tests.support.quantized import SETTINGS, QuantizedReference, save_quantized, wide_model
from weft.adapters.quantized import is_quantized
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import quantization
from weft.server.engine.engine import Engine

TASK = "CAUSAL_LM"
METHODS = [
    "adalora",
    "ia3",
    "ia3_patterns",
    "ia3_modules_to_save",
    "ln_tuning",
    "lora_modules_to_save",
    "trainable_tokens",
    "lora_trainable_tokens",
    "lora_embedding",
    "lora_saved_embedding",
    "vera",
    "vera_unsaved",
    "vera_bias",
    "pvera",
    "miss",
    "miss_bat",
    "gralora",
    "randlora",
    "hira",
    "deft_para",
    "shira",
    "fourierft",
    "c3a",
    "waveft",
    "beft",
    "vblora",
    "shadow",
    "shadow_own_embeddings",
    "lily",
]
"""Cases that peft runs on quantised linears."""
BY_WEIGHT = ["hra", "delora", "deft", "supertuning", "glora", "peanut", "hira_gaussian"]
"""Cases that peft defines by the base's weight, and cannot run where that is packed."""


def dora(**fields: object) -> LoraConfig:
    return LoraConfig(task_type=TASK, r=5, use_dora=True, **fields)  # type: ignore[arg-type]


def configs(arch: str) -> dict[str, PeftConfig]:
    """What is served on the quantised base, beside LoRA's variants."""
    linears = "all-linear"
    own: dict[str, PeftConfig] = {
        "dora": dora(target_modules=linears),
        "dora-rslora": dora(target_modules=linears, use_rslora=True, lora_alpha=3),
        "bias-all": LoraConfig(task_type=TASK, r=3, bias="all", target_modules=linears),
        "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=21),
        "prompt": PromptTuningConfig(task_type=TASK, num_virtual_tokens=35),
    }
    if arch == "llama":
        cases = all_cases()
        own |= {name: cases[name] for name in (*METHODS, *BY_WEIGHT)}
    return own


class Quantized:
    """A base, adapters for it, and peft's answers by how the base is quantised."""

    def __init__(self, arch: str, folder: Path) -> None:
        self.base = wide_model(arch, folder / "base")
        self.adapters: dict[str, Path] = {}
        for seed, (name, config) in enumerate(configs(arch).items()):
            scale = 3.0 if name in ("prefix", "prompt") else 0.3
            self.adapters[name] = make_adapter(self.base, folder / name, config, seed=seed, scale=scale)
        for name, fields in lora_variants(arch).items():
            self.adapters[f"lora-{name}"] = make_lora(self.base, folder / f"lora-{name}", **fields)

    @cache  # noqa: B019  one object per module of tests
    def oracle(self, kind: str, name: str | None) -> QuantizedReference:
        adapter = None if name is None else self.adapters[name]
        return QuantizedReference(self.base, adapter, dequantized=name in BY_WEIGHT, **SETTINGS[kind])

    def driver(self, names: list[str], kind: str, **settings: object) -> Driver:
        engine = Engine(
            EngineConfig(
                str(self.base),
                dtype="float32",
                quantization=kind,
                **{"max_adapters": 64, "adapter_memory": 1 << 26, **settings},  # type: ignore[arg-type]
            )
        )
        for name in names:
            engine.register_adapter(name, self.adapters[name])
        return Driver(engine)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    return cache(lambda arch: Quantized(arch, tmp_path_factory.mktemp(arch)))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return wide_model("llama", tmp_path / "base", num_hidden_layers=1)


def start(base: Path, **settings: object) -> Engine:
    return Engine(EngineConfig(str(base), **{"dtype": "float32", **settings}))  # type: ignore[arg-type]


CHUNKED = {"max_num_batched_tokens": 256, "block_size": 8}


@pytest.mark.parametrize(
    ("arch", "kind", "settings"),
    [("llama", "nf4", {}), ("llama", "int8", CHUNKED), ("gpt2", "nf4", CHUNKED), ("gpt2", "int8", {})],
    ids=lambda given: given if isinstance(given, str) else "chunked" if given else "whole",
)
def test_a_mixed_batch_equals_peft(arch: str, kind: str, settings: dict, bases: Callable[[str], Quantized]) -> None:
    zoo = bases(arch)
    names = list(zoo.adapters)
    driver = zoo.driver(names, kind, **settings)
    rng = random.Random(0)
    for name in (*names, None):
        driver.add(random_prompt(rng, 8, 40), name, max_tokens=25, prompt_logprobs=0)
    driver.run()
    assert driver.engine.stats().max_step_adapters == len(names)
    plain = zoo.oracle(kind, None)
    for stream in driver.streams.values():
        name = stream.request.adapter
        assert_alone(stream, zoo.oracle(kind, name))
        if name is not None:  # else the test proves nothing
            prompt = stream.request.prompt_token_ids
            assert (plain.logits(prompt) - zoo.oracle(kind, name).logits(prompt)).abs().max() > 0.05, name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_row_does_not_see_the_others(kind: str, bases: Callable[[str], Quantized]) -> None:
    zoo = bases("llama")
    prompt, logprobs = random_prompt(random.Random(3), 20, 30), []
    for others in (0, 11):
        driver = zoo.driver(["dora"], kind)
        stream = driver.add(prompt, None, max_tokens=24, prompt_logprobs=0)
        rng = random.Random(4)
        for _ in range(others):
            driver.add(random_prompt(rng, 8, 40), "dora", max_tokens=24)
        driver.run()
        assert_alone(stream, zoo.oracle(kind, None))
        logprobs.append(torch.tensor([entry.logprob for entry in stream.logprobs]))
    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS["nf4"],
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},  # FP4
        SETTINGS["int8"],
        {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["mlp"]},  # a head in 4 bits
    ],
    ids=["nf4", "nf4-single", "fp4-bf16-storage", "int8", "int8-skip", "nf4-head"],
)
def test_a_checkpoint_that_is_quantised_already(settings: dict, tmp_path: Path) -> None:
    base = wide_model("llama", tmp_path / "base", num_hidden_layers=2)
    saved = save_quantized(base, tmp_path / "saved", **settings)
    adapters = {
        "lora": make_lora(base, tmp_path / "lora", r=4, target_modules="all-linear"),
        "dora": make_adapter(base, tmp_path / "dora", dora(target_modules=["q_proj", "o_proj", "down_proj"])),
    }
    driver = Driver(start(saved))
    for name, folder in adapters.items():
        driver.engine.register_adapter(name, folder)
    rng = random.Random(1)
    for name in (*adapters, None):
        driver.add(random_prompt(rng), name, max_tokens=24)
    driver.run()
    for stream in driver.streams.values():
        adapter = adapters.get(stream.request.adapter or "")
        assert_alone(stream, QuantizedReference(saved, adapter))
    assert driver.engine.info.num_parameters == start(base).info.num_parameters


def test_quantisation_is_part_of_what_the_cache_is_known_by(tiny: Path, tmp_path: Path) -> None:
    prints = [start(tiny, quantization=kind).info.fingerprint for kind in ("none", "nf4", "int8", "nf4")]
    assert len(set(prints)) == 3 and prints[1] == prints[3]
    saved = save_quantized(tiny, tmp_path / "saved", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert start(saved).info.fingerprint not in prints


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_are_small_and_calculate_in_the_serving_dtype(kind: str, tiny: Path) -> None:
    engine = start(tiny, quantization=kind, dtype="bfloat16")
    model = engine.runner.model
    packed = [module for module in model.modules() if is_quantized(module)]
    assert len(packed) == 7
    for module in packed:
        numbers = module.in_features * module.out_features
        assert module.weight.nbytes == (numbers // 2 if kind == "nf4" else numbers)
        assert getattr(module, "compute_dtype", torch.bfloat16) == torch.bfloat16
    assert engine.info.num_parameters == start(tiny).info.num_parameters


def test_fp32_stays_fp32_on_any_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512 BF16 bitsandbytes would repack the weights and calculate in bf16."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    driver = Driver(start(tiny, quantization="nf4"))
    stream = driver.add([5, 17, 3, 99], None, max_tokens=8)
    driver.run()
    assert_alone(stream, QuantizedReference(tiny, None, **SETTINGS["nf4"]), tolerance=1e-4)


def test_a_wrong_value(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="quantization must be one of none, nf4, int8; got 'fp8'"):
        start(tiny, quantization="fp8")


def test_without_bitsandbytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_quantized(tiny, tmp_path / "saved", load_in_8bit=True)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match=r"quantization 'nf4' needs bitsandbytes .*weft\[quantization\]"):
        start(tiny, quantization="nf4")
    with pytest.raises(ConfigError, match="the checkpoint's quantization_config needs bitsandbytes"):
        start(saved)
    assert start(tiny).info.dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "none", "quant_method is 'gptq'; only bitsandbytes"),
        ({"quant_method": "fp8"}, "nf4", "quant_method is 'fp8'; only bitsandbytes"),
        ({"bits": 4}, "none", "quant_method is None; only bitsandbytes"),
        ({"load_in_8bit": True}, "nf4", "is 'nf4', but the checkpoint is quantised already, to int8"),
        ({"load_in_4bit": True}, "nf4", "is 'nf4', but the checkpoint is quantised already, to fp4"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "none", "llm_int8_has_fp16_weight is True"),
        ({"load_in_8bit": True, "new_option": 3}, "none", "new_option is 3"),
        ({"load_in_4bit": True}, "none", r"the weight of model\.layers\.0\.self_attn\.q_proj is not quantised"),
        ({"load_in_8bit": True}, "none", r"the weight of model\.layers\.0\.self_attn\.q_proj is not quantised"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["model", "lm_head"]}, "none", "no linear layers"),
    ],
)
def test_a_checkpoint_that_cannot_be_served(fields: dict, quantization: str, message: str, tiny: Path) -> None:
    file = tiny / "config.json"
    saved = fields if "quant_method" in fields or "bits" in fields else {"quant_method": "bitsandbytes", **fields}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": saved}))
    with pytest.raises(ConfigError, match=message):
        start(tiny, quantization=quantization)


def test_offloading_in_a_checkpoint_has_no_effect(tiny: Path, tmp_path: Path) -> None:
    saved = save_quantized(tiny, tmp_path / "saved", load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=False)
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    file.write_text(json.dumps(config))
    assert sum(is_quantized(module) for module in start(saved).runner.model.modules()) == 7


def test_blocks_across_rows_are_refused(tmp_path: Path) -> None:
    base = wide_model("llama", tmp_path / "base", num_hidden_layers=1, intermediate_size=96)
    with pytest.raises(ConfigError, match=r"down_proj has 96 inputs, no multiple of 64.*use int8, or a GPU"):
        start(base, quantization="nf4")
    assert start(base, quantization="int8").info.dtype == "float32"
