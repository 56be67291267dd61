"""LoRA on parameters (``target_parameters``): equal to peft where it is served, refused by name where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.adapters.conftest import TinyBase
from tests.adapters.test_method_parity import assert_parity
from tests.engine.mixtures import mixture_variants
from tests.support.adapters import edit_config, edit_tensors, make_adapter, make_lora
from tests.support.models import MIXTURES
from weft.adapters.base import Base
from weft.adapters.errors import AdapterError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter

Bases = Callable[[str], TinyBase]

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(("arch", "variant"), [(arch, name) for arch in MIXTURES for name in mixture_variants(arch)])
def test_variant_equals_peft(arch: str, variant: str, tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base(arch)
    assert_parity(tiny, make_lora(tiny.folder, tmp_path / "adapter", **mixture_variants(arch)[variant]))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [], "target_parameters": ["q_proj.weight", "layers.1.mlp.down_proj.weight"]},
        {"target_modules": ["k_proj"], "target_parameters": ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"]},
    ],
    ids=["parameters alone", "beside modules"],
)
def test_weights_of_linears_equal_peft(config: dict[str, Any], llama: TinyBase, tmp_path: Path) -> None:
    assert_parity(llama, make_lora(llama.folder, tmp_path / "adapter", r=4, scale=1.0, **config))


def test_weights_of_conv1d_equal_peft(tiny_base: Bases, tmp_path: Path) -> None:
    gpt2 = tiny_base("gpt2")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=[], target_parameters=["c_attn.weight", "c_fc.weight"]
    )
    assert_parity(gpt2, make_adapter(gpt2.folder, tmp_path / "adapter", config, scale=1.0))


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("mixtral", ["q_proj", "gate", "w1", "w2", "w3"]),
        ("mixtral", ["o_proj", "w2"]),
        ("mixtral", "all-linear"),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_what_peft_converts_and_saves_equals_peft(
    arch: str, targets: list[str] | str, tiny_base: Bases, tmp_path: Path
) -> None:
    """Names of transformers 4: peft writes what it made of them into the config."""
    tiny = tiny_base(arch)
    assert_parity(tiny, make_lora(tiny.folder, tmp_path / "adapter", r=3, target_modules=targets))


@pytest.mark.parametrize("arch", MIXTURES)
def test_a_base_known_by_its_shape_has_the_same_parameters(arch: str, tiny_base: Bases) -> None:
    tiny = tiny_base(arch)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(tiny.model.config)
    sites = tiny.base.parameter_sites
    assert Base.of(shape).parameter_sites == sites
    assert {site.kind for site in sites.values()} == {"router", "experts"}
    mixtures = {path.rpartition(".")[0] for path in sites if path.endswith((".gate", ".router"))}
    assert len(sites) == 3 * len(mixtures) > 0, "a router and two parameters of experts in every such layer"


def test_the_rank_is_that_of_one_expert(tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("mixtral")
    folder = make_lora(tiny.folder, tmp_path / "adapter", r=6, target_modules=[], target_parameters=[UP])
    assert compile_adapter(folder, tiny.base, version="v").rank == 6


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    return caught.value


def experts_adapter(tiny: TinyBase, folder: Path) -> Path:
    return make_lora(tiny.folder, folder, r=2, target_modules=[], target_parameters=[UP, DOWN])


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"target_parameters": [UP, DOWN, "mlp.experts.w9"]}, "target_parameters", "mlp.experts.w9"),
        ({"target_parameters": [UP, DOWN, "norm.weight"]}, "target_parameters", "norm.weight"),
        ({"target_parameters": [UP, DOWN, "embed_tokens.weight"]}, "target_parameters", "embed_tokens"),
        ({"target_parameters": "gate_up_proj"}, "target_parameters", "list"),
        ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "target_parameters", "q_proj"),
        ({"use_dora": True}, "use_dora", "peft refuses"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens", "peft refuses"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "not recomputed"),
        ({"lora_bias": True}, "lora_bias", "peft refuses"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out", "peft refuses"),
        ({"lora_dropout": 0.1}, "lora_dropout", "peft refuses"),
        ({"rank_pattern": {"down_proj": 3}}, f"{EXPERTS}.lora_A.weight", "shape"),
        ({"target_parameters": [UP]}, f"{EXPERTS}.lora_A.weight", "shape"),
        ({"target_modules": ["w1", "w3"]}, "target_modules", "w1"),
        ({"target_modules": ["gate"]}, "target_modules", "gate"),
        ({"target_modules": "all-linear"}, "target_modules", "save it again"),
        ({"target_modules": r".*layers\.0\..*q_proj"}, "target_modules", "save it again"),
        ({"target_modules": r".*experts\..*\.w1"}, "target_modules", "save it again"),
    ],
)
def test_config_is_refused(fields: dict[str, Any], param: str, word: str, tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("mixtral")
    folder = experts_adapter(tiny, tmp_path / "adapter")
    edit_config(folder, **fields)
    error = refusal(folder, tiny)
    assert error.param == param and word in error.message


def test_a_plain_expression_is_served(tiny_base: Bases, tmp_path: Path) -> None:
    """It selects what peft makes of it: every module of the name."""
    tiny = tiny_base("mixtral")
    folder = make_lora(tiny.folder, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    edit_config(folder, target_modules=r".*\.(q|v)_proj")
    assert_parity(tiny, folder)


@pytest.mark.parametrize("name", [f"{EXPERTS}.lora_B.weight", f"{EXPERTS}.base_layer.lora_A.weight"])
@pytest.mark.parametrize("what", ["missing", "fewer experts", "misshapen"])
def test_tensor_is_refused(name: str, what: str, tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("mixtral")
    folder = experts_adapter(tiny, tmp_path / "adapter")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensor = tensors.pop(name)
        if what == "fewer experts":
            tensors[name] = tensor[:-2] if "lora_A" in name else tensor[:, :-2]
        elif what == "misshapen":
            tensors[name] = tensor.T
        return tensors

    edit_tensors(folder, change)
    error = refusal(folder, tiny)
    assert isinstance(error, AdapterMismatch) and error.param == name


def test_a_tensor_too_many_is_refused(tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("mixtral")
    folder = experts_adapter(tiny, tmp_path / "adapter")
    name = f"{EXPERTS}.0.w1.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors | {name: torch.ones(2, 48)})
    assert refusal(folder, tiny).param == name


def test_a_trained_bias_of_the_router_equals_peft(tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("gpt_oss")
    assert_parity(tiny, make_lora(tiny.folder, tmp_path / "adapter", r=2, bias="all", target_modules=["q_proj"]))


def test_a_saved_router_with_a_buffer_is_refused(tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("deepseek_v3")
    config = {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}
    error = refusal(make_lora(tiny.folder, tmp_path / "adapter", r=2, **config), tiny)
    assert isinstance(error, AdapterMismatch) and "e_score_correction_bias" in error.message


def test_parameters_of_another_kind_are_refused(tiny_base: Bases, tmp_path: Path) -> None:
    tiny = tiny_base("gpt_oss")
    config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj_bias"]}
    error = refusal(make_lora(tiny.folder, tmp_path / "adapter", r=2, **config), tiny)
    assert isinstance(error, AdapterUnsupported) and "gate_up_proj_bias" in error.message
