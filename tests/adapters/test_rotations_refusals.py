"""What is refused of the methods that rotate: by method, with the field or the tensor named."""

from __future__ import annotations

import dataclasses
import shutil
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
TENSORS = {"OFT": f"{Q1}.oft_R.weight", "BOFT": f"{Q1}.boft_R", "ROAD": f"{Q1}.road_theta"}
FIELDS: dict[str, dict[str, Any]] = {"OFT": {"oft_block_size": 8}, "BOFT": {}, "ROAD": {"group_size": 8}}

Saved = Callable[[str], Path]


@pytest.fixture(scope="session")
def originals(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Adapters for q_proj, one of each method."""

    @cache
    def make(method: str) -> Path:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](target_modules=["q_proj"], **FIELDS[method])
        return make_adapter(tiny_base("llama").folder, tmp_path_factory.mktemp(method) / "adapter", config)

    return make


@pytest.fixture
def saved(originals: Saved, tmp_path: Path) -> Saved:
    """``saved("OFT")``: a copy to spoil."""
    return lambda method: shutil.copytree(originals(method), tmp_path / "adapter")


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    assert len(caught.value.message) < 500
    return caught.value


@pytest.mark.parametrize("method", TENSORS)
def test_tensor_missing(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), TENSORS[method]
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if k != name})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "missing" in error.message


@pytest.mark.parametrize("method", TENSORS)
def test_tensor_misshapen(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), TENSORS[method]
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.cat([tensors[name], tensors[name][:1]])})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "has shape" in error.message


@pytest.mark.parametrize("method", TENSORS)
def test_tensor_without_a_place(method: str, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved(method), TENSORS[method].replace("q_proj", "k_proj")
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.ones(4, 4)})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == name and "no place" in error.message


@pytest.mark.parametrize("method", TENSORS)
def test_conv1d_that_peft_cannot_adapt(method: str, saved: Saved, tiny_base: Callable[[str], TinyBase]) -> None:
    folder = saved(method)
    edit_config(folder, target_modules=["c_attn"])
    error = refusal(folder, tiny_base("gpt2"))
    assert isinstance(error, AdapterUnsupported) and error.param == "target_modules" and "c_attn" in error.message


@pytest.mark.parametrize("method", ["BOFT", "ROAD"])
def test_embedding_that_peft_cannot_adapt(method: str, saved: Saved, llama: TinyBase) -> None:
    folder = saved(method)
    edit_config(folder, target_modules=["q_proj", "embed_tokens"])
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "target_modules"


@pytest.mark.parametrize("method", TENSORS)
def test_module_both_saved_and_adapted(method: str, saved: Saved, llama: TinyBase) -> None:
    folder = saved(method)
    edit_config(folder, modules_to_save=["q_proj"])
    weights = {f"{Q1.replace('1.self', f'{layer}.self')}.weight": torch.ones(80, 48) for layer in range(3)}
    biases = {name.replace("weight", "bias"): torch.ones(80) for name in weights}
    edit_tensors(folder, lambda tensors: tensors | weights | biases)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "modules_to_save"


MALFORMED: list[tuple[str, str, dict[str, object]]] = [
    ("OFT", "oft_block_size", {"r": 4}),
    ("OFT", "oft_block_size", {"oft_block_size": 0}),
    ("OFT", "oft_block_size", {"oft_block_size": -8}),
    ("OFT", "r", {"r": "4"}),
    ("OFT", "num_cayley_neumann_terms", {"num_cayley_neumann_terms": 0}),
    ("OFT", "num_cayley_neumann_terms", {"num_cayley_neumann_terms": 1 << 20}),
    ("OFT", "use_cayley_neumann", {"use_cayley_neumann": 1}),
    ("OFT", "use_cayley_neumann", {"use_cayley_neumann": None}),
    ("OFT", "coft", {"coft": "yes"}),
    ("OFT", "eps", {"coft": True, "eps": -1.0}),
    ("OFT", "block_share", {"block_share": "yes"}),
    ("OFT", "bias", {"bias": "some"}),
    ("BOFT", "boft_block_size", {"boft_block_num": 4}),
    ("BOFT", "boft_block_size", {"boft_block_size": 0}),
    ("BOFT", "boft_block_num", {"boft_block_num": -1}),
    ("BOFT", "boft_n_butterfly_factor", {"boft_n_butterfly_factor": 0}),
    ("ROAD", "variant", {"variant": "road_3"}),
    ("ROAD", "group_size", {"group_size": 0}),
    ("ROAD", "group_size", {"group_size": 5}),
]


@pytest.mark.parametrize(("method", "field", "fields"), MALFORMED)
def test_malformed_field(method: str, field: str, fields: dict[str, object], saved: Saved, llama: TinyBase) -> None:
    folder = saved(method)
    edit_config(folder, **fields)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == field and field in error.message


UNFIT: list[tuple[str, str, dict[str, object]]] = [
    ("BOFT", "boft_block_size", {"boft_block_size": 5}),
    ("BOFT", "boft_block_num", {"boft_block_size": 0, "boft_block_num": 7}),
    ("ROAD", "group_size", {"group_size": 12}),
    ("ROAD", "group_size", {"group_size": 1 << 20}),
]


@pytest.mark.parametrize(("method", "field", "fields"), UNFIT)
def test_size_that_does_not_fit_the_base(
    method: str, field: str, fields: dict[str, object], saved: Saved, llama: TinyBase
) -> None:
    folder = saved(method)
    edit_config(folder, **fields)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == field


@pytest.mark.parametrize(("factors", "size"), [(6, 4), (31, 4), (2, 3)])
def test_butterfly_that_does_not_fit_the_base(factors: int, size: int, saved: Saved, llama: TinyBase) -> None:
    folder, name = saved("BOFT"), TENSORS["BOFT"]
    edit_config(folder, boft_n_butterfly_factor=factors, boft_block_size=size)
    shape = (factors, 48 // size, size, size)
    edit_tensors(folder, lambda ts: {k: torch.zeros(shape) if k.endswith("boft_R") else t for k, t in ts.items()})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == "boft_n_butterfly_factor"
    edit_config(folder, boft_n_butterfly_factor=factors + 1)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and str(error.param).endswith("boft_R") and name


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0.dev0", "0.18.0.dev0@a1b2c3", "0.9.9", "", "newest", None])
def test_series_of_an_older_peft(version: str | None, saved: Saved, llama: TinyBase) -> None:
    folder = saved("OFT")
    edit_config(folder, peft_version=version)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "peft_version"
    edit_config(folder, use_cayley_neumann=False)
    compile_adapter(folder, llama.base, version="v")


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1.dev0@a1b2c3", "0.18.0@a1b2c3", "0.21.2", "1.0.0"])
def test_series_of_a_newer_peft(version: str, saved: Saved, llama: TinyBase) -> None:
    folder = saved("OFT")
    edit_config(folder, peft_version=version)
    compile_adapter(folder, llama.base, version="v")


def test_oft_of_before_its_block_size(saved: Saved, llama: TinyBase) -> None:
    folder = saved("OFT")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"oft_block_size"', '"alpha"').replace('"r": 0', '"r": 6'))
    edit_config(folder, alpha=None)
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "oft_block_size"


def test_base_without_weights(saved: Saved, llama: TinyBase) -> None:
    unloaded = dataclasses.replace(llama.base, parameters={n: p.to("meta") for n, p in llama.base.parameters.items()})
    with pytest.raises(BaseWeightsNeeded, match="weights"):
        compile_adapter(saved("BOFT"), unloaded, version="v")
