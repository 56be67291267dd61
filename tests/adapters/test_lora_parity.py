"""Compiled LoRA adapters against peft: the update of every module, and the logits of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.adapters.conftest import TinyBase
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_lora
from tests.support.forms import applied, dense_delta
from tests.support.models import ARCHITECTURES
from weft.adapters.forms import CompiledAdapter
from weft.adapters.methods import compile_adapter

PROMPT = [5, 9, 100, 42, 7, 33, 2, 150, 8, 64, 71, 20]
TOLERANCE = 1e-5  # relative to the largest logit, or weight of the update

VARIANTS: dict[str, dict[str, Any]] = {
    "default_targets": {"r": 4},
    "all_linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "head": {"r": 5, "target_modules": ["q_proj", "lm_head"]},
    "head_only": {"r": 5, "target_modules": ["lm_head"]},
    "rslora": {"r": 9, "use_rslora": True},
    "float_alpha": {"r": 4, "lora_alpha": 2.5},
    "negative_alpha": {"r": 4, "lora_alpha": -6},
    "rank_one": {"r": 1, "target_modules": ["down_proj"]},
    "rank_beyond_width": {"r": 100, "target_modules": ["k_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"^model.layers.1.self_attn.v_proj": 2, "q_proj": 8, r"layers\.[02]\.mlp\.\w+": 6},
        "alpha_pattern": {"v_proj": 5, "model.layers.0.mlp.up_proj": 3.5},
    },
    "patterns_rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "pattern_of_no_module": {"r": 4, "rank_pattern": {"proj": 2, "oj": 3, "layers": 5}},
    "layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "layers_and_full_path": {"r": 4, "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    "one_layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "layers_patterns": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", r"lay\w+"],
    },
    "exclude_list": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj", "0.self_attn.q_proj"]},
    "exclude_regex": {"r": 4, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.[01]\..*"},
    "regex": {"r": 4, "target_modules": r".*layers\.[02].*(q|down)_proj"},
    "regex_lookahead": {"r": 4, "target_modules": r"(?!.*layers\.1)model\.layers(?=\.).*\.(o_proj|gate_proj)"},
    "suffix_paths": {"r": 4, "target_modules": ["0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
    "dora_rslora": {"r": 3, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "bias_all": {"r": 4, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "bias_lora_only": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "dora_bias_all": {"r": 4, "bias": "all", "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "lora_alpha": 20, "target_modules": ["q_proj", "down_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "no_init": {"r": 4, "init_lora_weights": False},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    "training_options": {"r": 4, "lora_dropout": 0.5, "fan_in_fan_out": True, "inference_mode": True},
    "no_task": {"r": 4, "task_type": None},
}


def assert_parity(tiny: TinyBase, folder: Path) -> CompiledAdapter:
    """The compiled adapter equals peft's, module by module and in the logits; returns it."""
    reference = PeftReference(tiny.folder, folder)
    compiled = compile_adapter(folder, tiny.base, version="v")
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in reference.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert layers.keys() <= compiled.sites.keys()
    for path, layer in layers.items():
        if layer.use_dora["default"]:
            continue  # the update is no longer a product of two factors; the logits tell
        low_rank = compiled.sites[path].low_rank
        assert low_rank is not None
        if low_rank.rank != layer.r["default"]:
            continue  # peft took the further ranks from the base's weight itself; the logits tell
        # peft stores the update as the base stores its weight; Conv1D's is transposed.
        delta = layer.get_delta_weight("default").double()
        site = tiny.base.module(path)
        assert site is not None
        delta = delta.T if site.kind in ("conv1d", "embedding") else delta
        torch.testing.assert_close(
            dense_delta(compiled.sites[path]), delta, rtol=0, atol=TOLERANCE * float(delta.abs().max())
        )
    expected = reference.logits(PROMPT)
    with torch.no_grad(), applied(tiny.model, compiled):
        actual = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    return compiled


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_peft(variant: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", seed=3, **VARIANTS[variant])
    compiled = assert_parity(llama, folder)
    assert compiled.method == "LORA"
    adapted = [path for path, forms in compiled.sites.items() if forms.low_rank is not None]
    assert len(adapted) == len(compiled.sites) or VARIANTS[variant].get("bias") == "all"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_linear_of_every_architecture_equals_peft(
    arch: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path
) -> None:
    tiny = tiny_base(arch)
    names = sorted({path.rpartition(".")[2] for path in tiny.base.sites})
    folder = make_lora(tiny.folder, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=names)
    assert assert_parity(tiny, folder).sites.keys() == tiny.base.sites.keys()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3", "mistral", "qwen2", "qwen3"])
def test_default_targets_of_every_architecture_equal_pefts(
    arch: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path
) -> None:
    tiny = tiny_base(arch)
    folder = make_lora(tiny.folder, tmp_path / "adapter")
    explicit = compile_adapter(folder, tiny.base, version="v")
    edit_config(folder, target_modules=None)
    assert compile_adapter(folder, tiny.base, version="v").sites.keys() == explicit.sites.keys()
    assert_parity(tiny, folder)


def test_all_linear_is_resolved_here_too(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", target_modules="all-linear")
    edit_config(folder, target_modules="All-Linear")
    assert assert_parity(llama, folder).sites.keys() == llama.base.sites.keys() - {"lm_head"}


def test_adapter_changes_the_greedy_tokens(tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    """Else the parity of the engine would prove nothing."""
    for arch in ARCHITECTURES:
        tiny = tiny_base(arch)
        folder = make_lora(tiny.folder, tmp_path / arch, target_modules="all-linear")
        base, adapted = PeftReference(tiny.folder), PeftReference(tiny.folder, folder)
        assert base.generate(PROMPT, 4).tokens != adapted.generate(PROMPT, 4).tokens, arch
        assert float(adapted.logits(PROMPT).abs().max()) < 50, arch


def test_adapter_name_in_tensor_names(llama: TinyBase, tmp_path: Path) -> None:
    """State dicts saved without peft's help keep the name ``default``, and peft loads them."""
    folder = make_lora(llama.folder, tmp_path / "adapter")
    edit_tensors(folder, lambda tensors: {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()})
    assert_parity(llama, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_saved_in_half_precision(dtype: torch.dtype, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter")
    edit_tensors(folder, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    assert_parity(llama, folder)


def test_scale_is_folded_in_fp32_and_cast_once(llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "adapter", r=3, lora_alpha=7)
    exact = compile_adapter(folder, llama.base, version="v")
    cast = compile_adapter(folder, llama.base, version="v", dtype=torch.bfloat16)
    for path, forms in cast.sites.items():
        expected = exact.sites[path].low_rank
        assert forms.low_rank is not None and expected is not None
        assert torch.equal(forms.low_rank.b, expected.b.bfloat16())
        assert torch.equal(forms.low_rank.a, expected.a.bfloat16())
    assert cast.nbytes * 2 == exact.nbytes


def test_forms_own_their_memory(llama: TinyBase, tmp_path: Path) -> None:
    """They outlive the file, which the store may delete, and hold no more than themselves."""
    folder = make_lora(llama.folder, tmp_path / "adapter")
    compiled = compile_adapter(folder, llama.base, version="v")
    for forms in compiled.sites.values():
        for tensor in forms.parts().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
