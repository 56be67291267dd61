"""What cannot be served exactly is refused, with the field or the tensor named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from transformers import AutoModelForCausalLM

from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_lora
from tests.support.models import tiny_model
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterUnsupported,
    BaseWeightsNeeded,
)
from weft.adapters.methods import METHODS, PROMPT_METHODS, compile_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(llama: TinyBase, tmp_path: Path) -> Path:
    return make_lora(llama.folder, tmp_path / "adapter", r=4)


def refusal(folder: Path, tiny: TinyBase, **options: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v", **options)
    return caught.value


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "task_type": {"task_type": "SEQ_2_SEQ_LM"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_option_saved_by_peft(field: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=4, **UNSUPPORTED[field])
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field and field in error.message


SET_FIELDS: list[tuple[str, object]] = [
    ("arrow_config", {"top_k": 2}),
    ("megatron_config", {"x": 1}),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "from_the_future"),
    ("init_lora_weights", 1),
    ("task_type", "SEQ_CLS"),
    ("task_type", "TOKEN_CLS"),
    ("task_type", "FEATURE_EXTRACTION"),
    ("task_type", "nonsense"),
    ("peft_type", "NONSENSE"),
    ("field_of_a_later_version", 3),
    ("field_of_a_later_version", 0),
    ("field_of_a_later_version", "x"),
]


@pytest.mark.parametrize(("field", "value"), SET_FIELDS)
def test_option_set_in_the_config(field: str, value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **{field: value})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field and field in error.message


@pytest.mark.parametrize("peft_type", sorted(set(PeftType) - {*METHODS, *PROMPT_METHODS}))
def test_every_other_peft_type_is_refused_by_name(peft_type: PeftType, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, peft_type=peft_type.value)
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "peft_type" and peft_type.value in error.message


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_field_without_a_value_is_harmless(value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, field_of_a_later_version=value)
    compile_adapter(adapter, llama.base, version="v")


MALFORMED: list[tuple[str, object]] = [
    ("r", 0),
    ("r", -1),
    ("r", 4.0),
    ("r", "4"),
    ("r", True),
    ("r", None),
    ("r", 10**12),
    ("lora_alpha", "8"),
    ("lora_alpha", None),
    ("lora_alpha", [8]),
    ("lora_alpha", True),
    ("lora_alpha", 10**400),
    ("use_rslora", "false"),
    ("use_rslora", 1),
    ("use_dora", 1),
    ("bias", True),
    ("bias", "some"),
    ("lora_bias", "yes"),
    ("rank_pattern", []),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": 2.5}),
    ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"q_proj": "8"}),
    ("alpha_pattern", {"*": 8}),
    ("target_modules", 3),
    ("target_modules", [3]),
    ("target_modules", {"q_proj": 1}),
    ("target_modules", "("),
    ("target_modules", "a" * 70_000),
    ("exclude_modules", "["),
    ("exclude_modules", [None]),
    ("layers_to_transform", [0.5]),
    ("layers_to_transform", [True]),
    ("layers_to_transform", "0"),
    ("layers_pattern", "layers"),
    ("peft_type", None),
    ("peft_type", 3),
    ("task_type", 3),
    ("ensure_weight_tying", "no"),
]


@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_malformed_field(field: str, value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **{field: value})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterFormatError) and error.param == field and field in error.message
    assert len(error.message) < 500


def test_layers_with_a_long_list_of_full_paths(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=list(llama.base.sites), layers_to_transform=[0])
    assert refusal(adapter, llama).param == "layers_to_transform"


def test_layers_with_a_pattern_as_target(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=".*q_proj", layers_to_transform=[0])
    assert refusal(adapter, llama).param == "layers_to_transform"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_pattern_that_never_ends(field: str, llama: TinyBase, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.adapters.patterns.CPU_SECONDS", 1)
    pattern = r"(((\w|\.)*)*)*!"
    edit_config(adapter, **{field: {pattern: 2} if field.endswith("_pattern") else pattern})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterFormatError) and error.param == field


@pytest.mark.parametrize("target", ["self_attn", "input_layernorm", "model"])
def test_target_that_is_no_linear(target: str, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "v_proj", target])
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "target_modules" and target in error.message


@pytest.mark.parametrize(
    "value", [[], [3, 3], [160], [-1], [1.5], {"q_proj": [3]}, {"embed_tokens": 3}, "3", {"embed_tokens": []}]
)
def test_trained_tokens_that_are_none(value: object, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=4, trainable_token_indices=[3, 7])
    edit_config(folder, trainable_token_indices=value)
    error = refusal(folder, llama)
    # Without tokens in the config their rows have no place.
    assert error.param == "trainable_token_indices" or (not value and "trainable_tokens_delta" in str(error.param))


def test_trained_modules_that_are_none(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=4, modules_to_save=["lm_head"])
    edit_config(folder, modules_to_save=["nothing"])
    assert "lm_head" in str(refusal(folder, llama).param)  # saved, and nothing says what for
    edit_config(folder, modules_to_save=["lm_head", "norm"])
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and "norm.weight" in error.message


@pytest.mark.parametrize("targets", [["nothing"], [], "nothing", [""]])
def test_targets_that_select_nothing(targets: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=targets)
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterMismatch) and error.param == "target_modules"


def test_no_targets_and_no_default(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, target_modules=None)
    unknown = dataclasses.replace(llama.base, model_type="unheard_of")
    with pytest.raises(AdapterUnsupported, match="unheard_of"):
        compile_adapter(adapter, unknown, version="v")


def test_adapter_of_another_base(llama: TinyBase, adapter: Path, tmp_path: Path) -> None:
    narrow = tiny_model("llama", tmp_path / "narrow", hidden_size=32, num_hidden_layers=3)
    shallow = tiny_model("llama", tmp_path / "shallow", num_hidden_layers=2)
    gpt2 = tiny_model("gpt2", tmp_path / "gpt2", n_layer=1)
    for folder, words in ((narrow, "has shape"), (shallow, "has none"), (gpt2, "selects no module")):
        base = Base.of(AutoModelForCausalLM.from_pretrained(folder))
        with pytest.raises(AdapterMismatch, match=words):
            compile_adapter(adapter, base, version="v")


def test_deeper_base_lacks_tensors(adapter: Path, tmp_path: Path) -> None:
    deep = Base.of(AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path / "deep", num_hidden_layers=4)))
    with pytest.raises(AdapterMismatch, match=r"layers\.3.*missing"):
        compile_adapter(adapter, deep, version="v")


def test_tensor_missing(llama: TinyBase, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {k: t for k, t in tensors.items() if k != f"{Q0}.lora_B.weight"})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterMismatch) and error.param == f"{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        f"{Q0}.lora_magnitude_vector",
        f"{Q0}.lora_B.bias",
        f"{Q0}.lora_A.default.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.nowhere.lora_A.weight",
        "base_model.model.model.norm.weight",
        "model.norm.weight",
        Q0,
        "",
        "\x00\n",
    ],
)
def test_tensor_without_a_place(name: str, llama: TinyBase, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {**tensors, name: torch.ones(4, 48)})
    error = refusal(adapter, llama)
    assert error.param == name and error.message.isprintable()


def test_dora_tensors_under_a_plain_config(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", use_dora=True)
    edit_config(folder, use_dora=False)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and "lora_magnitude_vector" in error.message


@pytest.mark.parametrize("shape", [(8, 48), (4, 47), (48, 4), (4,), (4, 48, 1)])
def test_wrong_shape(shape: tuple[int, ...], llama: TinyBase, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {**tensors, f"{Q0}.lora_A.weight": torch.ones(shape)})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterMismatch) and error.param == f"{Q0}.lora_A.weight"
    assert str(list(shape)) in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float, llama: TinyBase, adapter: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value
        return tensors

    edit_tensors(adapter, spoil)
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterFormatError) and error.param == f"{Q0}.lora_B.weight"


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_overflow_in_the_serving_dtype(part: str, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, lora_alpha=1)
    edit_tensors(
        adapter, lambda tensors: {k: t * 0 + 3e5 if part in k and "layers.1" in k else t for k, t in tensors.items()}
    )
    compile_adapter(adapter, llama.base, version="v")
    error = refusal(adapter, llama, dtype=torch.float16)
    assert isinstance(error, AdapterFormatError) and "float16" in error.message and "layers.1." in str(error.param)


@pytest.mark.parametrize("tensor", [torch.ones(4, 48).double(), torch.ones(4, 48).int(), torch.ones(4, 48).bool()])
def test_dtype_that_is_no_weight(tensor: torch.Tensor, llama: TinyBase, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {**tensors, f"{Q0}.lora_A.weight": tensor})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterFormatError) and error.param == f"{Q0}.lora_A.weight"


def test_copy_of_the_head_that_differs(llama: TinyBase, tmp_path: Path) -> None:
    """peft saves the head beside an adapter for it, and loads it over the base's: an equal one is fine."""
    folder = make_lora(llama.folder, tmp_path / "adapter", target_modules=["lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][0, 0] += 1
        return tensors

    compile_adapter(folder, llama.base, version="v")
    unloaded = dataclasses.replace(llama.base, parameters={n: p.to("meta") for n, p in llama.base.parameters.items()})
    with pytest.raises(BaseWeightsNeeded, match="loaded"):
        compile_adapter(folder, unloaded, version="v")
    edit_tensors(folder, change)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == name


def test_tied_adapters(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    base = Base.of(AutoModelForCausalLM.from_pretrained(folder))
    adapter = make_lora(folder, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    compile_adapter(adapter, base, version="v")
    edit_config(adapter, ensure_weight_tying=True)
    with pytest.raises(AdapterUnsupported, match="ensure_weight_tying"):
        compile_adapter(adapter, base, version="v")
