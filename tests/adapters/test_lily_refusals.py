"""Lily: what cannot be served exactly is refused, with the field or tensor named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LilyConfig

from tests.adapters.cases.basic import TASK
from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_adapter
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from weft.adapters.methods import compile_adapter

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lily_{}.weight"


@pytest.fixture
def saved(llama: TinyBase, tmp_path: Path) -> Callable[..., Path]:
    def make(**fields: Any) -> Path:
        given = {"r": 4, "num_B": 3, "stride_A": 2, "target_modules": ["q_proj", "v_proj"], **fields}
        return make_adapter(llama.folder, tmp_path / "adapter", LilyConfig(task_type=TASK, **given))

    return make


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in (0, 1 << 20, "4")),
        *(("num_B", value) for value in (1, 0, 1 << 30)),
        *(("stride_A", value) for value in (0, 1.5)),
        ("scaling", "much"),
    ],
)
def test_a_field_that_is_wrong(field: str, value: object, llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, **{field: value})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterFormatError) and error.param == field


@pytest.mark.parametrize(("field", "value"), [("later", True), ("task_type", "SEQ_CLS")])
def test_what_is_not_served(field: str, value: object, llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, **{field: value})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field


def test_the_head(llama: TinyBase, saved: Callable[..., Path]) -> None:
    error = refusal(saved(target_modules=["lm_head", "q_proj"]), llama)
    assert isinstance(error, AdapterUnsupported) and "how many tokens' logits" in error.message


def test_conv1d(tiny_base: Callable[[str], TinyBase], saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, target_modules=["c_attn"])
    error = refusal(folder, tiny_base("gpt2"))
    assert isinstance(error, AdapterUnsupported) and "no nn.Linear" in error.message


def test_names_of_which_two_select_a_module(llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, target_modules=["q_proj", "v_proj", "layers.1.self_attn.q_proj"])
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and "left to chance" in error.message


def test_a_list_that_peft_shortens(llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, target_modules=["q_proj", "v_proj", *(f"other{index}" for index in range(18))])
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and "shortens" in error.message


@pytest.mark.parametrize(("layer", "which"), [(1, "A"), (1, "B"), (2, "B")])
def test_copies_that_differ(layer: int, which: str, llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder, name = saved(), Q.format(layer, which)
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name] + 1})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterMismatch) and error.param == f"lily_{which}"


def test_layers_that_share_nothing_may_differ(llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder, name = saved(), Q.format(2, "A")  # the third layer begins another two
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name] + 1})
    compile_adapter(folder, llama.base, version="v")


@pytest.mark.parametrize(
    ("stride", "pattern"), [(1, ["q_proj", "v_proj"]), (2, r".*\.(q_proj|v_proj)"), (2, ["v_proj", "k_proj"])]
)
def test_another_way_of_sharing(stride: int, pattern: object, llama: TinyBase, saved: Callable[..., Path]) -> None:
    """A file that one config made, and another claims: either what is shared differs, or nothing is."""
    folder = saved(stride_A=1)
    edit_config(folder, stride_A=stride, target_modules=pattern)
    if stride == 1:
        compile_adapter(folder, llama.base, version="v")
    else:
        assert isinstance(refusal(folder, llama), AdapterMismatch)


@pytest.mark.parametrize("which", ["A", "B", "router"])
def test_tensors_that_are_missing_or_of_another_shape(which: str, llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder, name = saved(), Q.format(0, which)
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name][:-1]})
    assert refusal(folder, llama).param == name
    edit_tensors(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert refusal(folder, llama).param == name
    edit_tensors(folder, lambda tensors: {**tensors, "base_model.model.more": torch.ones(1)})
    assert isinstance(refusal(folder, llama), AdapterMismatch)


def test_more_than_there_is_memory_for(llama: TinyBase, saved: Callable[..., Path]) -> None:
    folder = saved()
    small = TinyBase(llama.folder, llama.model, type(llama.base)(**{**vars(llama.base), "adapter_memory": 1000}))
    assert isinstance(refusal(folder, small), AdapterTooLarge)
