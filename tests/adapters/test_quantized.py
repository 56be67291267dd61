"""Bases in 4 or 8 bits as the loaders see them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight

from tests.adapters.cases import all_cases
from tests.support.adapters import make_adapter
from tests.support.quantized import SETTINGS, quantized_model, wide_model
from weft.adapters.base import Base
from weft.adapters.errors import AdapterUnsupported, BaseWeightsNeeded
from weft.adapters.methods import compile_adapter
from weft.adapters.quantized import Int8Linear, count_parameters
from weft.server.engine.quantization import quantize_shape, settle

KINDS = sorted(SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda arch: wide_model(arch, tmp_path_factory.mktemp(arch), num_hidden_layers=1))


def settled(folder: Path, kind: str) -> Any:
    model = quantized_model(folder, **SETTINGS[kind])
    settle(model, {"quantization_config": model.config.quantization_config})
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_sites_are_those_of_the_plain_base(arch: str, kind: str, folder: Callable[[str], Path]) -> None:
    source = folder(arch)
    plain = Base.of(quantized_model(source))
    theirs = quantized_model(source, **SETTINGS[kind])
    base = Base.of(settled(source, kind))
    assert base.sites.keys() == plain.sites.keys() and base.dtype == torch.float32
    assert base.quantized.keys() == plain.sites.keys() - {"lm_head"}
    for path, site in base.sites.items():
        known = plain.sites[path]
        assert (site.in_features, site.out_features) == (known.in_features, known.out_features)
        assert site.kind == "linear" and site.has_bias == known.has_bias
        weight = base.weight(site)
        torch.testing.assert_close(weight, dequantize_module_weight(theirs.get_submodule(path)).float())
        error = (weight - plain.weight(known)).norm() / plain.weight(known).norm()
        assert error < (0.12 if kind == "nf4" else 0.01) and (error == 0) == (path == "lm_head")
        if site.has_bias:
            torch.testing.assert_close(base.bias(site), plain.bias(known))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_numbers_are_counted(kind: str, folder: Callable[[str], Path]) -> None:
    assert count_parameters(settled(folder("llama"), kind)) == quantized_model(folder("llama")).num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_known_by_its_shape(kind: str, folder: Callable[[str], Path]) -> None:
    model = quantized_model(folder("gpt2")).to("meta")
    quantize_shape(model, kind)
    base = Base.of(model)
    loaded = Base.of(settled(folder("gpt2"), kind))
    assert base.sites == loaded.sites and base.quantized.keys() == loaded.quantized.keys()
    with pytest.raises(BaseWeightsNeeded):
        base.weight(base.sites["transformer.h.0.attn.c_attn"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_what_bitsandbytes_trains_with_on_a_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = Linear8bitLt(40, 24, has_fp16_weights=False, threshold=6.0)
    theirs.weight = Int8Params(torch.randn(24, 40, generator=generator), requires_grad=False).to("cpu")
    ours = Int8Linear(theirs.weight.data, theirs.weight.SCB, theirs.bias.data.to(dtype))
    x = torch.randn(9, 40, generator=generator).to(dtype)
    x[4, 7] = 9.0  # an outlier, for which LLM.int8() spares the whole column
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.train()(x))


def test_int8_rows_do_not_see_each_other(folder: Callable[[str], Path]) -> None:
    """Which LLM.int8() itself cannot say: one row's outlier changes how the others are rounded."""
    theirs = quantized_model(folder("llama"), **SETTINGS["int8"]).get_submodule("model.layers.0.mlp.up_proj").eval()
    ours = settled(folder("llama"), "int8").get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x[5, 3] = 30.0
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[:1], ours(x[:1]), atol=1e-6, rtol=1e-5)
        assert (theirs(x)[:1] - theirs(x[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("osf", "OSF is served on unquantised layers only"),
        ("psoft", "PSOFT is served on unquantised layers only"),
        ("tinylora", "TinyLoRA is served on unquantised layers only"),
        ("frod", "FRoD is served on unquantised layers only"),
        ("unilora", "Uni-LoRA is served on unquantised layers only"),
        ("pissa", "took its start from the base .pissa. is served on unquantised layers only"),
        ("lora_saved_linear", "modules_to_save replaces .*gate_proj.*, which is quantised"),
    ],
)
def test_what_is_refused(kind: str, case: str, message: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = make_adapter(folder("llama"), tmp_path / "adapter", all_cases()[case])
    with pytest.raises(AdapterUnsupported, match=message):
        compile_adapter(adapter, Base.of(settled(folder("llama"), kind)), version="v")
    compile_adapter(adapter, Base.of(quantized_model(folder("llama"))), version="v")
