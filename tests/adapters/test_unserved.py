"""Types of peft that are not served: each is refused with its own reason, and the reasons hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftType, XLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_tensors, make_lora
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.methods import METHODS, PROMPT_METHODS, compile_adapter
from weft.adapters.methods.unserved import CLASSIFIER, REASONS

TASK = "CAUSAL_LM"
PROMPT = [5, 17, 3, 120, 44, 9]


def refusal(folder: Path, tiny: TinyBase) -> AdapterUnsupported:
    with pytest.raises(AdapterUnsupported) as caught:
        compile_adapter(folder, tiny.base, version="v")
    assert caught.value.param == "peft_type"
    return caught.value


def test_nothing_is_both_served_and_refused() -> None:
    assert not REASONS.keys() & {*METHODS, *PROMPT_METHODS}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_peft_loses_the_classifier_of_x_lora(depth: int, llama: TinyBase, tmp_path: Path) -> None:
    experts = {
        name: str(make_lora(llama.folder, tmp_path / name, seed=seed, target_modules=["q_proj"]))
        for seed, name in enumerate("01")
    }
    config = XLoraConfig(task_type=TASK, hidden_size=48, adapters=experts, xlora_depth=depth, xlora_size=8)
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(str(tmp_path / "x"))
    assert "lacks" in refusal(tmp_path / "x", llama).message
    edit_tensors(tmp_path / "x", lambda tensors: {**tensors, CLASSIFIER: torch.ones(2, 48)})
    assert "runs the base twice" in refusal(tmp_path / "x", llama).message


def test_every_type_of_peft_is_served_or_has_its_reason() -> None:
    assert {kind.value for kind in PeftType} == set(METHODS) | set(PROMPT_METHODS) | set(REASONS)
