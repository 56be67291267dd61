"""LoRA's variants where peft does not define them, or where what they took from the base cannot be known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.adapters import edit_config, edit_tensors, make_lora
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.methods import compile_adapter


@pytest.fixture
def adapter(llama: TinyBase, tmp_path: Path) -> Path:
    return make_lora(llama.folder, tmp_path / "adapter", r=4)


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2, "later": 3}}, "later"),
    ({"use_bdlora": {"target_modules_bd_a": "proj", "nblocks": 2}}, "use_bdlora"),
    ({"use_bdlora": {"target_modules_bd_a": ["k_proj"], "nblocks": 2}}, "use_bdlora"),
    ({"use_bdlora": {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["proj"]}}, "use_bdlora"),
    ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 0}}, "nblocks"),
    ({"use_bdlora": {"target_modules_bd_a": ["proj"]}, "lora_bias": True}, "lora_bias"),
    ({"use_bdlora": False}, "use_bdlora"),
    ({"velora_config": {"num_groups": 0}}, "num_groups"),
    ({"velora_config": {}, "kasa_config": {}}, "velora_config"),
    ({"kasa_config": {}, "use_dora": True}, "kasa_config"),
    ({"kasa_config": {}, "init_lora_weights": "pissa"}, "kasa_config"),
    ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora"),
    ({"init_lora_weights": "gaussian", "lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa", "lora_alpha": -3}, "lora_alpha"),
]


@pytest.mark.parametrize(("fields", "param"), VARIANTS)
def test_variant_that_is_not_defined(fields: dict[str, Any], param: str, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **fields)
    assert refusal(adapter, llama).param == param


def test_what_a_variant_took_must_follow_from_the_base(llama: TinyBase, tmp_path: Path) -> None:
    """Equal singular values, a head with a foreign weight, or one tied to the embedding."""
    folder = make_lora(llama.folder, tmp_path / "a", target_modules=["o_proj"], init_lora_weights="pissa")
    parameters = dict(llama.base.parameters)
    parameters["model.layers.0.self_attn.o_proj.weight"] = torch.eye(48, 80)
    with pytest.raises(AdapterUnsupported, match="does not follow"):
        compile_adapter(folder, replace(llama.base, parameters=parameters), version="v")
    head = make_lora(llama.folder, tmp_path / "b", target_modules=["lm_head"], init_lora_weights="pissa")
    with pytest.raises(AdapterUnsupported, match="tied"):
        compile_adapter(head, replace(llama.base, tied=True), version="v")
    name = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(head, lambda tensors: tensors | {name: llama.base.parameters["lm_head.weight"].clone()})
    assert refusal(head, llama).param == name


def test_kasa_keeps_a_singular_value(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=48, target_modules=["v_proj"])
    edit_config(folder, kasa_config={})
    edit_tensors(
        folder, lambda t: t | {n.replace("lora_A.weight", "lora_diag"): torch.ones(48) for n in t if "_A" in n}
    )
    assert refusal(folder, llama).param == "r"
