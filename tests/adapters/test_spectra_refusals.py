"""What the loaders of sparse, spectral and decomposed updates refuse, naming the field or the tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.cases.spectra import CASES
from tests.adapters.conftest import TinyBase
from tests.support.adapters import edit_config, edit_tensors, make_adapter
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterUnsupported,
    BaseWeightsNeeded,
)
from weft.adapters.methods import compile_adapter, frod, tinylora, unilora
from weft.adapters.parts import Part

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Adapter = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return cache(lambda case: make_adapter(tiny_base("llama").folder, tmp_path_factory.mktemp(case), CASES[case]))


@pytest.fixture
def adapter(saved: Adapter, tmp_path: Path) -> Adapter:
    """A copy of a case's adapter, to be changed."""
    return lambda case: Path(shutil.copytree(saved(case), tmp_path / "adapter"))


def refusal(folder: Path, base: Base) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, base, version="v")
    return caught.value


EVERY_METHOD = [
    "shira",
    "supertuning",
    "supertuning_lora",
    "fourierft_low_rank",
    "c3a_default_targets",
    "waveft_proportional",
    "beft",
    "glora",
    "glora_biases_only",
    "frod_diagonal",
    "vblora_many_vectors",
    "vblora_topk_of_one",
    "unilora_saved",
    "osf_default_targets",
    "psoft",
    "tinylora",
    "tinylora_drawn_tied",
]


@pytest.mark.parametrize("case", EVERY_METHOD)
def test_tensors_missing_extra_or_misshapen(case: str, llama: TinyBase, adapter: Adapter) -> None:
    folder = adapter(case)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = [name for name in tensors if "layers.0.self_attn.q_proj" in name or ".layers." not in name]
    names = [name for name in first or tensors if not name.endswith(".bias") and "lm_head" not in name]
    assert names
    for name in names:
        without = {n: t for n, t in tensors.items() if n != name}
        edit_tensors(folder, lambda _, without=without: without)
        error = refusal(folder, llama.base)
        assert isinstance(error, AdapterMismatch) and error.param == name and "missing" in error.message
        longer = torch.cat([tensors[name], tensors[name][:1]]) if len(tensors[name]) else torch.ones(1)
        edit_tensors(folder, lambda _, without=without, name=name, longer=longer: {**without, name: longer})
        error = refusal(folder, llama.base)
        assert isinstance(error, AdapterMismatch) and error.param == name and "shape" in error.message
    edit_tensors(folder, lambda _: {**tensors, f"{Q0}.nonsense": torch.ones(1)})
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterMismatch) and error.param == f"{Q0}.nonsense"


WRONG_FIELDS: list[tuple[str, str, object]] = [
    ("shira", "r", 0),
    ("shira", "r", 10**9),
    ("supertuning", "sparsity", 1.0),
    ("supertuning", "sparsity", -0.1),
    ("supertuning", "sparsity", 0.9999999),
    ("supertuning", "lora_alpha", 4),
    ("supertuning_lora", "r", 0),
    ("supertuning_lora", "lora_alpha", "4"),
    ("fourierft", "n_frequency", 0),
    ("fourierft", "n_frequency", 10**15),
    ("fourierft", "n_frequency_pattern", {"q_proj": 10**6}),
    ("fourierft", "n_frequency_pattern", {"q_proj": 2.5}),
    ("fourierft", "n_frequency_pattern", {"q_proj(": 5}),
    ("fourierft", "random_loc_seed", None),
    ("fourierft", "random_loc_seed", 1 << 64),
    ("fourierft", "scaling", "1"),
    ("fourierft", "bias", "some"),
    ("c3a", "block_size", 0),
    ("c3a", "block_size_pattern", {"q_proj": -4}),
    ("waveft", "random_loc_seed", "seed"),
    ("waveft_proportional", "n_frequency", 10**14),
    ("vblora", "topk", 31),
    ("vblora", "topk", 0),
    ("vblora", "r", 1 << 15),
    ("unilora", "proj_seed", -1),
    ("unilora", "proj_seed", None),
    ("unilora", "theta_d_length", 0),
    ("glora", "config_A_B", "nonsense"),
    ("glora", "config_C", "constant"),
    ("glora", "config_D_E", "lora"),
    ("frod", "sparse_rate", 2),
    ("frod", "projection_prng_key", 1.5),
    ("osf", "effective_rank", 0),
    ("osf", "effective_rank", -0.5),
    ("osf", "effective_rank", True),
    ("osf", "effective_rank", 10**400),
    ("osf", "rank_pattern", {"q_proj": "8"}),
    ("osf", "rank_pattern", {"q_proj(": 8}),
    ("psoft", "r", 41),
    ("psoft", "psoft_alpha", 0),
    ("psoft", "ab_svd_init", "svd"),
    ("psoft", "psoft_svd", "some"),
    ("psoft", "num_cayley_neumann_terms", 10**6),
    ("psoft_short_series", "cayley_neumann_eps", 2),
    ("psoft_sketch", "psoft_svd_lowrank_niter", 10**9),
    ("tinylora", "weight_tying", 1.5),
    ("tinylora", "u", 1 << 40),
    ("tinylora", "r", 0),
]


@pytest.mark.parametrize(("case", "field", "value"), WRONG_FIELDS)
def test_field_out_of_bounds(case: str, field: str, value: object, llama: TinyBase, adapter: Adapter) -> None:
    folder = adapter(case)
    edit_config(folder, **{field: value})
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterFormatError) and error.param == field and field in error.message


@pytest.mark.parametrize(("case", "field"), [("c3a", "block_size"), ("vblora", "vector_length")])
def test_size_that_does_not_divide_a_weight(case: str, field: str, llama: TinyBase, adapter: Adapter) -> None:
    folder = adapter(case)
    edit_config(folder, **{field: 7})
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterMismatch) and error.param == field


@pytest.mark.parametrize("family", ["coif1", "db11", "sym11", "haar", "nonsense"])
def test_wavelets_that_are_not_served(family: str, llama: TinyBase, adapter: Adapter) -> None:
    folder = adapter("waveft")
    edit_config(folder, wavelet_family=family)
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterUnsupported) and error.param == "wavelet_family" and "db10" in error.message


def with_row(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """``tensor`` with another first row."""
    return torch.cat([torch.full_like(tensor[:1], value), tensor[1:]])


BAD_TENSORS: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("shira", f"{Q0}.shira_indices", lambda t: with_row(t, 80)),
    ("shira", f"{Q0}.shira_indices", lambda t: with_row(t, -1)),
    ("shira", f"{Q0}.shira_indices", lambda t: with_row(t.flip(0), 48).flip(0)),
    ("shira", f"{Q0}.shira_indices", lambda t: t + 0.5),
    ("shira", f"{Q0}.shira_indices", lambda t: t * float("inf")),
    ("shira", f"{Q0}.shira_indices", lambda t: t.bfloat16()),
    ("shira", f"{Q0}.shira_weight", lambda t: t.int()),
    ("supertuning", f"{Q0}.supertuning_indices", lambda t: with_row(t, 80 * 48)),
    ("vblora_topk", f"{Q0}.vblora_logits_A_topk_indices", lambda t: with_row(t, 30)),
    ("vblora_topk", f"{Q0}.vblora_logits_A_topk_indices", lambda t: with_row(t, 3)),
    ("unilora_saved", f"{Q0}.unilora_indices_B", lambda t: with_row(t, 100)),
    ("glora_biases_only", f"{Q0}.glora_A.zeros", lambda t: with_row(t, 1)),
    ("frod", "base_model.frod_s_indices.self_attn_q_proj", lambda t: with_row(t, 48)),
    ("frod", "base_model.frod_s_size.self_attn_q_proj", lambda t: with_row(t, 47)),
]


@pytest.mark.parametrize(("case", "name", "change"), BAD_TENSORS)
def test_tensor_with_values_it_cannot_have(
    case: str, name: str, change: Callable[[torch.Tensor], torch.Tensor], llama: TinyBase, adapter: Adapter
) -> None:
    folder = adapter(case)
    edit_tensors(folder, lambda tensors: {**tensors, name: change(tensors[name])})
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterFormatError) and error.param == name


def test_weights_of_a_mix_beyond_one(llama: TinyBase, adapter: Adapter) -> None:
    folder = adapter("vblora_many_vectors")
    name = f"{Q0}.vblora_logits_A_topk_weights"
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name] + 1})
    error = refusal(folder, llama.base)
    assert isinstance(error, AdapterFormatError) and "more than 1" in error.message


def test_indices_in_float32_as_peft_saves_them_on_windows(llama: TinyBase, adapter: Adapter, saved: Adapter) -> None:
    folder = adapter("shira")
    edit_tensors(folder, lambda tensors: {n: t.float() if "indices" in n else t for n, t in tensors.items()})
    one, other = (compile_adapter(path, llama.base, version="v").sites for path in (folder, saved("shira")))
    for path, forms in one.items():
        (part, rows), *_ = forms.parts().items()
        assert part is Part.SPARSE and torch.equal(rows, other[path].parts()[part])


@pytest.mark.parametrize(
    "case",
    ["shira", "supertuning", "c3a", "beft", "glora", "osf", "psoft"],
)
def test_conv1d_that_peft_does_not_adapt(case: str, tiny_base: Callable[[str], TinyBase], adapter: Adapter) -> None:
    folder = adapter(case)
    edit_config(folder, target_modules=["c_attn"])
    error = refusal(folder, tiny_base("gpt2").base)
    assert isinstance(error, AdapterUnsupported) and error.param == "target_modules" and "c_attn" in error.message


def weights(base: Base, change: Callable[[torch.Tensor], torch.Tensor]) -> Base:
    return replace(base, parameters={name: change(tensor) for name, tensor in base.parameters.items()})


@pytest.mark.parametrize(
    "case", ["supertuning_unsaved", "glora", "frod", "frod_drawn", "osf", "psoft", "psoft_sketch", "fourierft"]
)
def test_base_without_weights(case: str, llama: TinyBase, adapter: Adapter) -> None:
    error = refusal(adapter(case), weights(llama.base, lambda tensor: tensor.to("meta")))
    assert isinstance(error, BaseWeightsNeeded)


@pytest.mark.parametrize(
    ("case", "field", "change"),
    [
        ("supertuning_unsaved", "save_precomputed_indices", torch.sign),
        ("osf", "effective_rank", lambda tensor: torch.eye(*tensor.shape) if tensor.ndim == 2 else tensor),
    ],
)
def test_base_that_leaves_the_adapter_open(
    case: str, field: str, change: Callable[[torch.Tensor], torch.Tensor], llama: TinyBase, adapter: Adapter
) -> None:
    error = refusal(adapter(case), weights(llama.base, change))
    assert isinstance(error, AdapterUnsupported) and error.param == field


@pytest.mark.parametrize(
    ("module", "case", "field"), [(unilora, "unilora", "r"), (tinylora, "tinylora_drawn_tied", "u")]
)
def test_more_random_values_than_are_drawn(
    module: Any, case: str, field: str, llama: TinyBase, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_VALUES", 1000)
    error = refusal(adapter(case), llama.base)
    assert isinstance(error, AdapterUnsupported) and error.param == field


def test_frod_of_modules_that_cannot_share_a_basis(llama: TinyBase, adapter: Adapter) -> None:
    path = "model.layers.1.self_attn.q_proj"
    wide = replace(llama.base.sites[path], in_features=64)
    error = refusal(adapter("frod"), replace(llama.base, sites={**llama.base.sites, path: wide}))
    assert isinstance(error, AdapterUnsupported) and "self_attn_q_proj" in error.message


@pytest.mark.parametrize(
    ("path", "role", "layer"),
    [
        ("lm_head", "lm_head", 9),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.layer.11.attention.output.dense", "attention_output", 11),
        ("encoder.layer.11.output.dense", "output_dense", 11),
        ("model.layers.3.experts.0", "experts_0", 3),
        ("model.layers.3.experts.0.w1", "w1", 3),
        ("transformer.h.2.layers.mlp", "layers_mlp", 2),
    ],
)
def test_frod_roles_are_pefts(path: str, role: str, layer: int) -> None:
    from peft.tuners.frod import model as peft_frod

    assert (frod._role(path), frod._layer(path, 9)) == (role, layer)
    assert (peft_frod._category_from_key(path), peft_frod._layer_index_from_key(path, 9)) == (role, layer)
