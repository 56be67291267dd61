"""ShadowPEFT: what peft cannot run, what is not in the file and what does not fit is refused with its name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShadowConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.adapters.conftest import TinyBase
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_adapter
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from weft.adapters.methods import compile_adapter

TASK = "CAUSAL_LM"
NETWORK = "base_model.shadow_backbone.default."
NUMBERS = {
    "r": 1,
    "update_hidden_size": 1,
    "shadow_num_hidden_layers": 1,
    "shadow_hidden_size": 1,
    "shadow_num_attention_heads": 1,
    "shadow_intermediate_size": 1,
}


@pytest.fixture
def adapter(llama: TinyBase, tmp_path: Path) -> Path:
    return make_adapter(llama.folder, tmp_path / "adapter", ShadowConfig(task_type=TASK, r=4))


def refusal(folder: Path, base: Base) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, base, version="v")
    return caught.value


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, 3.0, "4", True, 1 << 17, 1 << 40])
def test_a_number_that_is_none(field: str, value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **{field: value})
    error = refusal(adapter, llama.base)
    assert isinstance(error, AdapterFormatError) and error.param == field


@pytest.mark.parametrize("value", [float("1e30"), "0.1", True, None])
def test_a_strength_that_is_no_number(value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, shadow_alpha=value)
    error = refusal(adapter, llama.base)
    assert isinstance(error, AdapterFormatError) and error.param == "shadow_alpha"


def test_the_largest_numbers_take_neither_time_nor_memory(llama: TinyBase, adapter: Path) -> None:
    """They are compared with the file before anything of their size is made."""
    most: dict[str, Any] = {
        "shadow_num_hidden_layers": 64,
        "shadow_hidden_size": 1 << 16,
        "shadow_intermediate_size": 1 << 16,
        "shadow_num_attention_heads": 1 << 12,
        "update_hidden_size": 1 << 16,
        "r": 1 << 16,
    }
    edit_config(adapter, **most)
    started = time.monotonic()
    assert isinstance(refusal(adapter, llama.base), AdapterMismatch)
    small = dataclasses.replace(llama.base, adapter_memory=1 << 20)
    assert isinstance(refusal(adapter, small), AdapterTooLarge)
    assert time.monotonic() - started < 20


def test_another_checkpoint_is_not_fetched(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, shadow_model="shadow-llm/Qwen3-0.6B-H8B")
    error = refusal(adapter, llama.base)
    assert isinstance(error, AdapterUnsupported) and error.param == "shadow_model"


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (["mlp"], "not a whole decoder layer"),
        ("all-linear", "not a whole decoder layer"),
        (["model"], "not a whole decoder layer"),
        (["layers.0", "layers.2"], "between others"),
        (["layers.7"], "no module"),
    ],
)
def test_targets(targets: object, why: str, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=targets)
    error = refusal(adapter, llama.base)
    assert why in error.message and error.param == "target_modules"


def test_peft_itself_cannot_leave_out_a_layer_between_others(llama: TinyBase, tmp_path: Path) -> None:
    config = ShadowConfig(task_type=TASK, r=4, target_modules=["layers.0", "layers.2"])
    folder = make_adapter(llama.folder, tmp_path / "gap", config)
    with pytest.raises((AttributeError, TypeError)):
        PeftReference(llama.folder, folder).logits([3, 4])
    assert "between others" in refusal(folder, llama.base).message


@pytest.mark.parametrize("names", [["norm"], ["input_layernorm"], ["layers.0.mlp"], ["1"], ["shadow_down"], ["k_proj"]])
def test_saved_modules_inside_the_network_or_its_layers(names: list[str], llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, modules_to_save=names)
    error = refusal(adapter, llama.base)
    assert isinstance(error, AdapterUnsupported) and error.param == "modules_to_save"


def test_saved_embeddings_of_the_network_s_own(llama: TinyBase, tmp_path: Path) -> None:
    config = ShadowConfig(task_type=TASK, r=4, share_embeddings=False, modules_to_save=["embed_tokens"])
    folder = make_adapter(llama.folder, tmp_path / "own", config)
    assert refusal(folder, llama.base).param == "modules_to_save"


@pytest.mark.parametrize(
    "fields", [{"share_embeddings": False}, {"shadow_hidden_size": 24}, {"shadow_num_hidden_layers": 2}, {"r": 3}]
)
def test_a_file_of_other_sizes(fields: dict[str, Any], llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **fields)
    assert isinstance(refusal(adapter, llama.base), AdapterMismatch)


def test_tensors_without_a_place(llama: TinyBase, adapter: Path) -> None:
    more = f"{NETWORK}layers.1.mlp.up_proj.weight"
    edit_tensors(adapter, lambda tensors: {**tensors, more: torch.ones(2)})
    assert refusal(adapter, llama.base).param == more


def test_an_embedding_that_is_not_looked_at_is_no_weight(tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    """peft saves GPT-2's, and gives the network the base's vectors."""
    gpt2 = tiny_base("gpt2")
    folder = make_adapter(gpt2.folder, tmp_path / "adapter", ShadowConfig(task_type=TASK, r=4))
    compiled = compile_adapter(folder, gpt2.base, version="v")
    (network,) = (forms.network for forms in compiled.sites.values() if forms.network is not None)
    assert "wpe.weight" in network.names and "wte.weight" not in network.names
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("wte.weight")})
    assert refusal(folder, gpt2.base).param == f"{NETWORK}wte.weight"


def test_no_other_task(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, task_type="SEQ_CLS")
    assert refusal(adapter, llama.base).param == "task_type"


def test_the_name_under_which_it_was_trained(llama: TinyBase, tmp_path: Path) -> None:
    """peft writes ``default`` whatever the name, and so reads any."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    model = get_peft_model(model, ShadowConfig(task_type=TASK, r=4, init_weights=False), adapter_name="mine")
    model.save_pretrained(str(tmp_path))
    compiled = compile_adapter(tmp_path / "mine", llama.base, version="v")
    plain: Any = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(plain, str(tmp_path / "mine"))
    theirs = reloaded.base_model.model.model.layers[1].shadow_down["default"].weight
    side = compiled.sites["model.layers.1"].side
    assert side is not None and torch.equal(side.injection.a, theirs)
