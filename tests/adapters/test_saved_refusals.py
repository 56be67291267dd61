"""``modules_to_save`` that cannot be served exactly, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, PeftConfig, PromptTuningConfig, VeraConfig

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.adapters import edit_config, edit_tensors, make_adapter, make_lora
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter

CONFIGS: dict[str, PeftConfig] = {
    "ia3": IA3Config(modules_to_save=["lm_head"]),
    "vera": VeraConfig(modules_to_save=["lm_head"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=["lm_head"]),
}


@pytest.fixture(params=CONFIGS)
def adapter(request: pytest.FixtureRequest, llama: TinyBase, tmp_path: Path) -> Path:
    return make_adapter(llama.folder, tmp_path / "adapter", CONFIGS[request.param])


def test_a_tensor_missing_or_left(adapter: Path, llama: TinyBase) -> None:
    compile_adapter(adapter, llama.base, version="v")
    edit_config(adapter, modules_to_save=["lm_head", "model.norm"])
    assert isinstance(refusal(adapter, llama), AdapterMismatch | AdapterUnsupported)
    edit_config(adapter, modules_to_save=None)
    error = refusal(adapter, llama)
    assert error.param.endswith("lm_head.weight")  # another weight than the base's


@pytest.mark.parametrize("names", ["lm_head", ["lm_head", 3], {"lm_head": 1}, 7])
def test_names_of_another_type(names: Any, adapter: Path, llama: TinyBase) -> None:
    edit_config(adapter, modules_to_save=names)
    if names != "lm_head":
        assert refusal(adapter, llama).param == "modules_to_save"


@pytest.mark.parametrize("names", [["mlp", "up_proj"], ["model"], ["layers", "norm"]])
def test_a_module_within_another(names: list[str], adapter: Path, llama: TinyBase) -> None:
    edit_config(adapter, modules_to_save=names)
    error = refusal(adapter, llama)
    assert error.param == "modules_to_save" and "around" in error.message


def test_a_module_that_is_adapted_too(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=2, target_modules=["q_proj"], modules_to_save=["0.mlp"])
    edit_config(folder, target_modules=["q_proj", "0.mlp.up_proj"])
    prefix = "base_model.model.model.layers.0"
    edit_tensors(
        folder,
        lambda tensors: (
            tensors
            | {f"{prefix}.mlp.up_proj.lora_A.weight": tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"].clone()}
            | {
                f"{prefix}.mlp.up_proj.lora_B.weight": tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"].new_ones(
                    88, 2
                )
            }
        ),
    )
    error = refusal(folder, llama)
    assert error.param == "modules_to_save" and "adapted" in error.message


@pytest.mark.parametrize("name", ["model.norm", "embed_tokens", "2.mlp"])
def test_a_soft_prompt_behind_other_modules_than_the_head(name: str, llama: TinyBase, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=[name])
    error = refusal(make_adapter(llama.folder, tmp_path / "adapter", config), llama)
    assert error.param == "modules_to_save" and "soft prompt" in error.message
