"""Prompt tuning, P-tuning and prefix tuning: what cannot be served exactly is refused, with the field named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_adapter
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter

CONFIGS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(params=CONFIGS)
def adapter(request: pytest.FixtureRequest, llama: TinyBase, tmp_path: Path) -> Path:
    return make_adapter(llama.folder, tmp_path / "adapter", CONFIGS[request.param])


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    return caught.value


@pytest.mark.parametrize("value", [0, -1, 3.0, "4", None, True, 1 << 40])
def test_a_number_of_tokens_that_is_none(value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, num_virtual_tokens=value)
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterFormatError) and error.param == "num_virtual_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_transformer_submodules", 2), ("task_type", "SEQ_2_SEQ_LM"), ("later", 1)],
)
def test_an_option_that_changes_the_output(field: str, value: object, llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, **{field: value})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field


def test_tensors_that_do_not_fit(llama: TinyBase, adapter: Path) -> None:
    edit_config(adapter, num_virtual_tokens=5)
    assert refusal(adapter, llama).param == "prompt_embeddings"
    edit_config(adapter, num_virtual_tokens=4)
    edit_tensors(adapter, lambda tensors: {**tensors, "another": torch.ones(2)})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterMismatch) and error.param == "another"
    edit_tensors(adapter, lambda tensors: {"prompt_embeddings": tensors["prompt_embeddings"] * float("nan")})
    assert isinstance(refusal(adapter, llama), AdapterFormatError)
    edit_tensors(adapter, lambda tensors: {"another": torch.ones(2)})
    error = refusal(adapter, llama)
    assert isinstance(error, AdapterMismatch) and "missing" in error.message
