"""Poly, multitask prompts, DyLoRA and activated LoRA: what cannot be served exactly is refused, naming the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PolyConfig

from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_adapter, make_lora
from weft.adapters.choices import Choice
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter
from weft.adapters.parts import LowRank

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TASK = {"task_type": "CAUSAL_LM"}


@pytest.fixture
def made(llama: TinyBase, tmp_path: Path) -> Callable[..., Path]:
    """``made("poly")``: an adapter of that kind; ``fields`` are those of a LoRA's config."""

    def make(kind: str, **fields: Any) -> Path:
        folder = tmp_path / kind
        if kind == "poly":
            return make_adapter(llama.folder, folder, PolyConfig(r=4, n_tasks=2, n_skills=3, n_splits=2, **TASK))
        if kind == "mpt":
            config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=3, **TASK)
            return make_adapter(llama.folder, folder, config)
        make_lora(llama.folder, folder, **{"r": 4, **fields})
        edit_config(folder, **({"peft_type": "DYLORA"} if kind == "dylora" else {"alora_invocation_tokens": [10, 11]}))
        return folder

    return make


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    return caught.value


@pytest.mark.parametrize(
    ("kind", "field", "value", "error"),
    [
        ("poly", "poly_type", "mhr", AdapterUnsupported),
        ("poly", "task_type", "SEQ_2_SEQ_LM", AdapterUnsupported),
        ("poly", "later", 1, AdapterUnsupported),
        ("poly", "r", 0, AdapterFormatError),
        ("poly", "n_tasks", 0, AdapterFormatError),
        ("poly", "n_tasks", 1 << 40, AdapterFormatError),
        ("poly", "n_skills", -1, AdapterFormatError),
        ("poly", "n_splits", 3, AdapterFormatError),
        ("poly", "n_splits", 1 << 30, AdapterFormatError),
        ("mpt", "num_tasks", 0, AdapterFormatError),
        ("mpt", "num_ranks", "3", AdapterFormatError),
        ("mpt", "num_transformer_submodules", 2, AdapterUnsupported),
        ("mpt", "modules_to_save", ["norm"], AdapterUnsupported),
        ("dylora", "rank_pattern", {"q_proj": 2}, AdapterUnsupported),
        ("dylora", "alpha_pattern", {"q_proj": 2}, AdapterUnsupported),
        ("dylora", "use_rslora", True, AdapterUnsupported),
        ("dylora", "use_dora", True, AdapterUnsupported),
        ("dylora", "lora_bias", True, AdapterUnsupported),
        ("dylora", "bias", "all", AdapterUnsupported),
        ("dylora", "trainable_token_indices", [5], AdapterUnsupported),
        ("dylora", "init_lora_weights", "pissa", AdapterUnsupported),
        ("dylora", "alora_invocation_tokens", [5], AdapterUnsupported),
        ("dylora", "r", 1 << 20, AdapterFormatError),
        ("alora", "alora_invocation_tokens", "ab", AdapterFormatError),
        ("alora", "alora_invocation_tokens", [1.5], AdapterFormatError),
        ("alora", "alora_invocation_tokens", [10] * 257, AdapterFormatError),
        ("alora", "alora_invocation_tokens", [1 << 20], AdapterMismatch),
        ("alora", "alora_invocation_tokens", [-1], AdapterMismatch),
        ("alora", "modules_to_save", ["norm"], AdapterUnsupported),
        ("alora", "trainable_token_indices", [5], AdapterUnsupported),
        ("alora", "bias", "lora_only", AdapterUnsupported),
    ],
)
def test_a_field(
    kind: str, field: str, value: object, error: type[AdapterError], llama: TinyBase, made: Callable[..., Path]
) -> None:
    folder = made(kind)
    edit_config(folder, **{field: value})
    refused = refusal(folder, llama)
    assert isinstance(refused, error) and refused.param == field and field in refused.message


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("poly", f"{Q0}.poly_lora_A"),
        ("poly", f"{Q0}.poly_lora_B"),
        ("poly", f"{Q0}.poly_router.module_logits"),
        ("mpt", "prompt_embeddings"),
        ("mpt", "prefix_task_cols"),
        ("mpt", "prefix_task_rows"),
        ("dylora", f"{Q0}.lora_A.weight"),
        ("dylora", f"{Q0}.lora_B.weight"),
    ],
)
def test_a_tensor(kind: str, tensor: str, llama: TinyBase, made: Callable[..., Path]) -> None:
    folder = made(kind)
    edit_tensors(folder, lambda tensors: {**tensors, tensor: tensors[tensor] * float("nan")})
    assert isinstance(refusal(folder, llama), AdapterFormatError)
    edit_tensors(folder, lambda tensors: {**tensors, tensor: torch.ones(*tensors[tensor].shape, 2)})
    refused = refusal(folder, llama)
    assert isinstance(refused, AdapterMismatch) and refused.param == tensor
    edit_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != tensor})
    assert "missing" in refusal(folder, llama).message


def test_pefts_poly_has_no_conv1d(tiny_base: Callable[[str], TinyBase], made: Callable[..., Path]) -> None:
    folder = made("poly")
    edit_config(folder, target_modules=["c_attn"])
    refused = refusal(folder, tiny_base("gpt2"))
    assert isinstance(refused, AdapterUnsupported) and refused.param == "target_modules"


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"init_lora_weights": "mica"}, {"target_modules": ["embed_tokens"]}], ids=str
)
def test_what_peft_does_not_activate(fields: dict, llama: TinyBase, made: Callable[..., Path]) -> None:
    refused = refusal(made("alora", **fields), llama)
    assert isinstance(refused, AdapterUnsupported) and refused.param == "alora_invocation_tokens"


def test_no_invocation_tokens_are_a_plain_lora(llama: TinyBase, made: Callable[..., Path]) -> None:
    folder = made("alora")
    assert compile_adapter(folder, llama.base, version="v").invocation == (10, 11)
    edit_config(folder, alora_invocation_tokens=[])
    assert compile_adapter(folder, llama.base, version="v").invocation == ()


def test_dylora_is_what_its_authors_compute(llama: TinyBase, made: Callable[..., Path]) -> None:
    """Each factor scaled by √(r / b) and their product by α / r; tensors under loralib's names or peft's."""
    folder = made("dylora", r=6, lora_alpha=9, target_modules=["q_proj"])
    tensors: dict[str, torch.Tensor] = {}

    def keep(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors.update(found)
        return found

    def rename(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in found.items()}

    edit_tensors(folder, keep)
    a, b = (tensors[f"{Q0}.lora_{part}.weight"] for part in "AB")
    for change in (keep, rename):
        edit_tensors(folder, change)
        for rank in range(1, 7):
            compiled = compile_adapter(folder, llama.base, version="v", chosen={"lora_rank": rank})
            assert compiled.choices == (Choice("lora_rank", 1, 6, 6),) and compiled.rank == rank
            form = compiled.sites["model.layers.0.self_attn.q_proj"].low_rank
            assert isinstance(form, LowRank)
            root = (6 / rank) ** 0.5
            expected = (b[:, :rank] * root) @ (a[:rank] * root) * (9 / 6)
            torch.testing.assert_close(form.b @ form.a, expected)
    assert compile_adapter(folder, llama.base, version="v").rank == 6
