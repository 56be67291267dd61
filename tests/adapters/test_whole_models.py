"""Models trained in full, ReLoRA's among them, as differences from the base: against the models themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.adapters.test_own_formats import PROMPT, assert_equals
from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from tests.support.own_formats import Made, load, make_relora
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterTooLarge,
    BaseWeightsNeeded,
)
from weft.adapters.methods import compile_adapter
from weft.adapters.store import Store

Q0 = "model.layers.0.self_attn.q_proj"


def train_rest(model: Any) -> None:
    """Norms, biases, embedding, head, and a few values of a linear."""
    generator = torch.Generator().manual_seed(3)
    for name in ("model.norm.weight", "lm_head.weight", f"{Q0}.bias", "model.layers.1.mlp.up_proj.bias"):
        parameter = model.get_parameter(name)
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator) * parameter.std()
    model.get_parameter("model.embed_tokens.weight")[PROMPT[2:5]] += 0.5
    model.get_parameter("model.layers.2.self_attn.k_proj.weight")[3, 4] += 0.5


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({}, lambda model: None),
        ({"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "lm_head"]}, train_rest),
        ({"trainable_scaling": True}, train_rest),
        ({"r": 60, "target_modules": ["k_proj"], "keep_original": True}, train_rest),
        ({"target_modules": ["nothing"]}, train_rest),
    ],
)
def test_relora(
    fields: dict[str, Any], change: Callable[[Any], None], pickled: bool, llama: TinyBase, tmp_path: Path
) -> None:
    made = make_relora(llama.folder, tmp_path / "relora", pickled=pickled, fields=fields, change=change)
    assert assert_equals(llama, made).method == "RELORA"


def test_what_equals_the_base_takes_nothing(llama: TinyBase, tmp_path: Path) -> None:
    made = make_relora(llama.folder, tmp_path / "relora", fields={"target_modules": ["layers.1.self_attn.v_proj"]})
    compiled = compile_adapter(made.folder, llama.base, version="v")
    assert list(compiled.sites) == ["model.layers.1.self_attn.v_proj"]


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def edit_model(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen2"])
def test_a_model_trained_in_full(arch: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    tiny = tiny_base(arch)
    assert tiny.base.embedding is not None
    model = load(tiny.folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path in (*tiny.base.sites, *tiny.base.norms, tiny.base.embedding.path):
            if path != tiny.base.head or not tiny.base.tied:
                for parameter in model.get_submodule(path).parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.std()
    model.save_pretrained(tmp_path / "full")
    assert assert_equals(tiny, Made(tmp_path / "full", tmp_path / "full")).method == "FULL"


def test_tied_weights_may_be_saved_twice(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", tie_word_embeddings=True)
    plain = load(base)
    tied = TinyBase(base, plain.eval(), Base.of(plain))
    model = load(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1.0
        model.get_parameter(f"{Q0}.weight").mul_(1.5)
    model.save_pretrained(tmp_path / "full")
    assert_equals(tied, Made(tmp_path / "full", tmp_path / "full"))
    embedding = load_file(tmp_path / "full" / "model.safetensors")["model.embed_tokens.weight"]
    edit_model(tmp_path / "full", lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    compile_adapter(tmp_path / "full", tied.base, version="v")
    edit_model(tmp_path / "full", lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    assert refusal(tmp_path / "full", tied).param == "lm_head.weight"


def test_frequencies_of_old_checkpoints(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    own = 1.0 / (10000.0 ** (torch.arange(0, 20, 2) / 20))
    edit_model(folder, lambda tensors: tensors | {name: own})
    compile_adapter(folder, llama.base, version="v")
    edit_model(folder, lambda tensors: tensors | {name: own * 1.01})
    assert refusal(folder, llama).param == name


@pytest.mark.parametrize(
    "name", [f"{Q0}.weight", "model.norm.weight", f"{Q0}.bias", f"{Q0}.lora_A.weight", "lm_head.weight"]
)
def test_every_tensor_of_a_model_is_accounted_for(name: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    edit_model(folder, drop(name))
    assert refusal(folder, llama).param == name
    edit_model(folder, lambda tensors: tensors | {name: torch.ones(3, 3)})
    assert refusal(folder, llama).param == name


def test_a_tensor_too_many(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    edit_model(folder, lambda tensors: tensors | {f"{Q0}.scaling": torch.ones(1)})
    assert refusal(folder, llama).param == f"{Q0}.scaling"  # the reference cannot load that either


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"lora_only": True}, "lora_only"), ({"keep_original": False}, "keep_original"), ({"r": 0}, "r"),
     ({"quantize": "4bit"}, "quantize"), ({"r": 1 << 40}, "r"), ({"lora_alpha": "x"}, "lora_alpha"),
     ({"more": 1}, "more"), ({"trainable_scaling": True}, "model.layers.0.self_attn.q_proj.scaling"),
     ({"target_modules": 3}, "target_modules"), ({"target_modules": ["mlp"]}, None)],
)  # fmt: skip
def test_relora_refused(fields: dict[str, Any], param: str | None, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    edit_json(folder / "relora_config.json", **fields)
    assert refusal(folder, llama).param == (param or "model.layers.0.self_attn.k_proj.lora_A.weight")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers"),
        ({"num_labels": 1 << 40}, "num_labels"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": "x"}, "config.json"),
        ({"a_later_field": 3}, "a_later_field"),
    ],
)
def test_another_architecture(fields: dict[str, Any], param: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    edit_json(folder / "config.json", **fields)
    assert refusal(folder, llama).param == param


def test_the_base_itself(llama: TinyBase) -> None:
    assert "is the base" in refusal(llama.folder, llama).message


def test_a_model_beyond_the_memory(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    error = refusal(folder, TinyBase(llama.folder, llama.model, replace(llama.base, adapter_memory=10_000)))
    assert isinstance(error, AdapterTooLarge)


def test_weights_twice(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    torch.save({}, folder / "pytorch_model.bin")
    assert "twice" in refusal(folder, llama).message


def test_a_sharded_model(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "adapter_config.json is missing" in refusal(folder, llama).message


class Command:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_pickle_that_runs(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora", pickled=True).folder
    torch.save({f"{Q0}.weight": Command()}, folder / "pytorch_model.bin")
    assert "asks for" in refusal(folder, llama).message


def test_a_model_beside_an_adapter_is_not_part_of_it(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "lora", target_modules=["q_proj"])
    store = Store(tmp_path / "store")
    version = store.add(folder)
    make_relora(llama.folder, tmp_path / "relora")
    for file in (tmp_path / "relora").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert store.add(folder) == version


def test_a_model_on_a_base_of_shapes_alone(llama: TinyBase, tmp_path: Path) -> None:
    """``weft check`` then reads the weights."""
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    with torch.device("meta"):
        shapes = type(llama.model)(llama.model.config)
    error = refusal(folder, TinyBase(llama.folder, shapes, Base.of(shapes)))
    assert isinstance(error, BaseWeightsNeeded)


def test_a_model_on_a_quantised_base(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_relora(llama.folder, tmp_path / "relora").folder
    quantised = replace(llama.base, quantized={Q0: llama.model.get_submodule(Q0)})
    assert "quantised" in refusal(folder, TinyBase(llama.folder, llama.model, quantised)).message
