"""LLaMA-Adapter: what peft cannot run, and what does not fit, is refused with the field or tensor named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig

from tests.adapters.conftest import TinyBase
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_adapter
from tests.support.models import tiny_model
from weft.adapters.base import Base
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter


@pytest.fixture
def gpt2(tiny_base: Callable[[str], TinyBase]) -> TinyBase:
    return tiny_base("gpt2")


@pytest.fixture
def adapter(gpt2: TinyBase, tmp_path: Path) -> Path:
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    return make_adapter(gpt2.folder, tmp_path / "adapter", config)


def refusal(folder: Path, base: Base) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, base, version="v")
    return caught.value


@pytest.mark.parametrize("field", ["adapter_len", "adapter_layers"])
@pytest.mark.parametrize("value", [0, -1, 3.0, "4", None, True, 1 << 40])
def test_a_number_that_is_none(field: str, value: object, gpt2: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **{field: value})
    error = refusal(adapter, gpt2.base)
    assert isinstance(error, AdapterFormatError) and error.param == field


def test_modules_that_are_no_attention(gpt2: TinyBase, adapter: Path) -> None:
    for target in ("mlp", "self_attn", "0.attn"):
        edit_config(adapter, target_modules=target)
        error = refusal(adapter, gpt2.base)
        assert isinstance(error, AdapterMismatch) and error.param == "target_modules"


def test_another_number_of_layers(gpt2: TinyBase, adapter: Path) -> None:
    edit_config(adapter, adapter_layers=1)
    error = refusal(adapter, gpt2.base)
    assert isinstance(error, AdapterMismatch) and "h.1.attn.adaption_" in error.message
    edit_config(adapter, adapter_layers=3)
    error = refusal(adapter, gpt2.base)
    assert isinstance(error, AdapterMismatch) and "h.0.attn.adaption_" in error.message


def test_tensors_that_do_not_fit(gpt2: TinyBase, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {**tensors, "another": torch.ones(2)})
    assert refusal(adapter, gpt2.base).param == "another"
    edit_tensors(adapter, lambda tensors: {n: t * float("nan") for n, t in tensors.items() if n != "another"})
    assert isinstance(refusal(adapter, gpt2.base), AdapterFormatError)


def test_an_architecture_that_peft_has_none_for(
    tiny_base: Callable[[str], TinyBase], gpt2: TinyBase, adapter: Path
) -> None:
    error = refusal(adapter, tiny_base("qwen2").base)
    assert isinstance(error, AdapterMismatch) and "llama, mistral, gpt2" in error.message


@pytest.mark.parametrize("head_dim", [8, 20, 40])
def test_heads_that_peft_miscounts(head_dim: int, tmp_path: Path) -> None:
    """peft saves such an adapter, but neither its own forward nor ours can run it."""
    folder = tiny_model("llama", tmp_path / "base", head_dim=head_dim)
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    adapter = make_adapter(folder, tmp_path / "adapter", config)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        PeftReference(folder, adapter).logits([3, 4])
    error = refusal(adapter, Base.of(PeftReference(folder).model))
    assert isinstance(error, AdapterUnsupported) and "hidden size of 48" in error.message
