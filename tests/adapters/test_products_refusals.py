"""What is refused of the methods whose update is a product: by method, with the field or the tensor named."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_adapter
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterUnsupported,
    BaseWeightsNeeded,
)
from weft.adapters.methods import compile_adapter

Q1 = "base_model.model.model.layers.1.self_attn.q_proj"

FIRST_TENSOR: dict[str, str] = {
    "VERA": f"{Q1}.vera_lambda_b",
    "PVERA": f"{Q1}.pvera_lambda_d",
    "LOHA": f"{Q1}.hada_w2_b",
    "LOKR": f"{Q1}.lokr_w1",
    "HRA": f"{Q1}.hra_u",
    "MISS": f"{Q1}.miss_block",
    "DELORA": f"{Q1}.delora_w_norm",
    "GRALORA": f"{Q1}.gralora_A",
    "RANDLORA": f"{Q1}.randlora_gamma",
    "HIRA": f"{Q1}.hira_B",
    "DEFT": f"{Q1}.deft_R",
}
"""A tensor of each method."""

Saved = Callable[..., Path]


@pytest.fixture(scope="session")
def originals(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Adapters of rank 4 for q_proj, one of each kind asked for."""

    @cache
    def make(method: str, options: tuple[tuple[str, Any], ...]) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields = {"r": 4, "target_modules": ["q_proj"], **dict(options)}
            config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](**fields)
        return make_adapter(tiny_base("llama").folder, tmp_path_factory.mktemp(method) / "adapter", config)

    return make


@pytest.fixture
def saved(originals: Callable[..., Path], tmp_path: Path) -> Saved:
    """``saved("VERA", r=8)``: a copy to spoil."""

    def copy(method: str, **options: Any) -> Path:
        return shutil.copytree(originals(method, tuple(options.items())), tmp_path / "adapter")

    return copy


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    assert len(caught.value.message) < 500
    return caught.value


@pytest.mark.parametrize("method", FIRST_TENSOR)
def test_tensor_missing(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), FIRST_TENSOR[method]
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if k != name})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "missing" in error.message


@pytest.mark.parametrize("method", FIRST_TENSOR)
def test_tensor_misshapen(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), FIRST_TENSOR[method]
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.cat([tensors[name], tensors[name][:1]])})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "has shape" in error.message


@pytest.mark.parametrize("method", FIRST_TENSOR)
def test_tensor_without_a_place(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), FIRST_TENSOR[method].replace("q_proj", "k_proj")
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.ones(4, 4)})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "no place" in error.message


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "HRA", "MISS", "DELORA"])
def test_conv1d_that_peft_cannot_adapt(method: str, saved: Saved, tiny_base: Callable[[str], TinyBase]) -> None:
    folder = saved(method)
    edit_config(folder, target_modules=["c_attn"])
    error = refusal(folder, tiny_base("gpt2"))
    assert isinstance(error, AdapterUnsupported) and error.param == "target_modules" and "c_attn" in error.message


MALFORMED: list[tuple[str, str, object]] = [
    *((method, "r", 0) for method in FIRST_TENSOR),
    *((method, "r", 1 << 15) for method in FIRST_TENSOR),
    ("VERA", "projection_prng_key", 1 << 70),
    ("VERA", "save_projection", "yes"),
    ("VERA", "bias", "some"),
    ("PVERA", "bias", ["all"]),
    ("LOHA", "alpha", "8"),
    ("LOHA", "rank_pattern", {"q_proj": 1 << 20}),
    ("LOHA", "alpha_pattern", {"q_proj": None}),
    ("LOKR", "decompose_factor", 1.5),
    ("LOKR", "decompose_both", 1),
    ("HRA", "apply_GS", "yes"),
    ("MISS", "mini_r", -1),
    ("DELORA", "rank_pattern", {"q_proj": 0}),
    ("GRALORA", "gralora_k", 0),
    ("GRALORA", "gralora_k", 3),
    ("GRALORA", "hybrid_r", -1),
    ("GRALORA", "alpha", None),
    ("RANDLORA", "randlora_alpha", [1]),
    ("RANDLORA", "projection_prng_key", 0.5),
    ("DEFT", "decomposition_method", "svd"),
    ("DEFT", "alpha", "8"),
    ("DEFT", "para", 1),
]


@pytest.mark.parametrize(("method", "field", "value"), MALFORMED)
def test_malformed_field(method: str, field: str, value: object, saved: Saved, llama: TinyBase) -> None:
    folder = saved(method)
    edit_config(folder, **{field: value})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == field and field in error.message


UNSUPPORTED: list[tuple[str, str, object]] = [
    ("PVERA", "sample_at_inference", True),
    ("MISS", "init_weights", "of_later"),
    ("MISS", "init_weights", 1),
]


@pytest.mark.parametrize(("method", "field", "value"), UNSUPPORTED)
def test_option_that_is_not_served(method: str, field: str, value: object, saved: Saved, llama: TinyBase) -> None:
    folder = saved(method)
    edit_config(folder, **{field: value})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field and field in error.message


UNFIT: list[tuple[str, str, dict[str, object]]] = [
    ("GRALORA", "gralora_k", {"r": 9, "gralora_k": 9}),
    ("MISS", "r", {"r": 49}),
    ("MISS", "r", {"r": 5, "init_weights": "bat"}),
    ("MISS", "mini_r", {"mini_r": 3, "init_weights": "mini"}),
    ("MISS", "mini_r", {"mini_r": 0, "init_weights": "mini"}),
]


@pytest.mark.parametrize(("method", "field", "fields"), UNFIT)
def test_size_that_does_not_fit_the_base(
    method: str, field: str, fields: dict[str, object], saved: Saved, llama: TinyBase
) -> None:
    folder = saved(method)
    edit_config(folder, **fields)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == field


@pytest.mark.parametrize("method", ["VERA", "PVERA", "RANDLORA"])
def test_projection_beyond_reason(method: str, saved: Saved, llama: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(method, save_projection=False)
    compile_adapter(folder, llama.base, version="v")
    monkeypatch.setattr("weft.adapters.methods.factors.MAX_PROJECTION", 300)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == "r" and "random" in error.message


@pytest.mark.parametrize("method", ["vera", "pvera", "randlora"])
def test_projection_saved_or_not(method: str, saved: Saved, llama: TinyBase) -> None:
    """peft itself would not load what is missing, and would not look at what is too much."""
    folder, name = saved(method.upper()), f"base_model.{method}_B"
    edit_config(folder, save_projection=False)
    assert f".{method}_" in str(refusal(folder, llama).param)
    edit_config(folder, save_projection=True)
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if k != name})
    assert refusal(folder, llama).param == name


def test_copy_of_a_projection_that_differs(saved: Saved, llama: TinyBase) -> None:
    folder, name = saved("RANDLORA"), f"{Q1}.randlora_B"
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(Q1) or "_B" not in k})
    compile_adapter(folder, llama.base, version="v")
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors["base_model.randlora_B"] + 1})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name


@pytest.mark.parametrize("orthogonal", [False, True])
def test_reflection_without_a_direction(orthogonal: bool, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved("HRA", apply_GS=orthogonal), FIRST_TENSOR["HRA"]
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name] * torch.tensor([1, 0, 1, 1])})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == name


@pytest.mark.parametrize("rank", [49, 513])
def test_more_orthogonal_reflections_than_directions(rank: int, saved: Saved, llama: TinyBase) -> None:
    folder = saved("HRA", r=49, apply_GS=True)
    edit_config(folder, r=rank)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == "r"


@pytest.mark.parametrize(
    ("method", "options"), [("HRA", {}), ("HIRA", {}), ("DEFT", {}), ("MISS", {"init_weights": "bat"})]
)
def test_base_without_weights(method: str, options: dict[str, object], saved: Saved, llama: TinyBase) -> None:
    folder = saved(method, **options)
    unloaded = dataclasses.replace(llama.base, parameters={n: p.to("meta") for n, p in llama.base.parameters.items()})
    with pytest.raises(BaseWeightsNeeded, match="weights"):
        compile_adapter(folder, unloaded, version="v")
