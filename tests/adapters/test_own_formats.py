"""LoTR and MiLoRA: against the model that each defines, made without weft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_lora
from tests.support.forms import applied
from tests.support.own_formats import Made, load, make_lotr, make_milora
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterUnsupported,
)
from weft.adapters.forms import CompiledAdapter
from weft.adapters.methods import compile_adapter
from weft.adapters.store import Store

PROMPT = [5, 17, 3, 120, 44, 9, 77, 31]
Q0 = "model.layers.0.self_attn.q_proj"


def assert_equals(tiny: TinyBase, made: Made) -> CompiledAdapter:
    """Served on the base from the store, it has the logits of its own model, which are not the base's."""
    store = Store(made.folder.with_name(f"{made.folder.name}-store"))
    compiled = compile_adapter(store.path(store.add(made.folder)), tiny.base, version="v")
    expected = PeftReference(made.model, made.adapter).logits(PROMPT)
    with torch.no_grad(), applied(tiny.model, compiled):
        actual = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * size)
    plain = PeftReference(tiny.folder).logits(PROMPT)
    assert 0.02 * size < float((plain - expected).abs().max()) and size < 100, "an adapter that proves nothing"
    compile_adapter(made.folder, replace(tiny.base, adapter_memory=compiled.nbytes), version="v")
    return compiled


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ranks", [(1, 2), (3, 5), (40, 60)])
def test_lotr(ranks: tuple[int, int], whole: bool, llama: TinyBase, tmp_path: Path) -> None:
    compiled = assert_equals(llama, make_lotr(llama.folder, tmp_path / "lotr", ranks=ranks, whole=whole))
    assert compiled.method == "LOTR" and len(compiled.sites) == 6
    assert compiled.forms == (("LowRank",) if ranks[0] < 40 else ("Delta",))


def test_lotr_of_a_row(llama: TinyBase, tmp_path: Path) -> None:
    """As the authors' module computes it, product after product."""
    made = make_lotr(llama.folder, tmp_path / "lotr", scale=2.5)
    saved = load_file(made.folder / "adapter_model.safetensors")
    x = torch.randn(3, 48)
    expected = 2.5 / 3 * (((x @ saved[f"{Q0}.lotr.rhs"]) @ saved[f"{Q0}.lotr.mid"]) @ saved[f"{Q0}.lotr.lhs"])
    low_rank = compile_adapter(made.folder, llama.base, version="v").sites[Q0].low_rank
    assert low_rank is not None
    torch.testing.assert_close(x @ low_rank.a.T @ low_rank.b.T, expected)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"scale": "x"}, "scale"), ({"scale": None}, "scale"), ({"rank": 3}, "rank"), ({"bias": "all"}, "bias"),
     ({"modules_to_save": ["norm"]}, "modules_to_save"), ({"target_modules": ["k_proj"]}, None),
     ({"target_modules": ["nothing"]}, "target_modules"), ({"task_type": "SEQ_CLS"}, "task_type")],
)  # fmt: skip
def test_lotr_refused(fields: dict[str, Any], param: str | None, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lotr(llama.folder, tmp_path / "lotr").folder
    edit_config(folder, **fields)
    error = refusal(folder, llama)
    assert error.param == param or (param is None and error.param == "model.layers.0.self_attn.k_proj.lotr.mid")


@pytest.mark.parametrize("part", ["lhs", "mid", "rhs"])
@pytest.mark.parametrize("damage", [None, torch.ones(3), torch.ones(2, 3), torch.full((3, 3), torch.nan)])
def test_lotr_tensor_refused(part: str, damage: torch.Tensor | None, llama: TinyBase, tmp_path: Path) -> None:
    folder, name = make_lotr(llama.folder, tmp_path / "lotr").folder, f"{Q0}.lotr.{part}"
    edit_tensors(folder, lambda tensors: {n: t for n, t in (tensors | {name: damage}).items() if t is not None})
    assert refusal(folder, llama).param == name


def test_lotr_with_another_weight_of_the_base(llama: TinyBase, tmp_path: Path) -> None:
    """The frozen part of a whole state dict must be the base's."""
    folder, name = make_lotr(llama.folder, tmp_path / "lotr", whole=True).folder, f"{Q0}.linear.weight"
    edit_tensors(folder, lambda tensors: tensors | {name: tensors[name] * 1.001})
    error = refusal(folder, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == name


def test_lotr_on_conv1d(tiny_base: Callable[[str], TinyBase], llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lotr(llama.folder, tmp_path / "lotr").folder
    edit_config(folder, target_modules=["c_attn"])
    assert "Conv1D" in refusal(folder, tiny_base("gpt2")).message


@pytest.mark.parametrize(
    "fields", [{}, {"r": 7, "lora_alpha": 7}, {"lora_alpha": 9, "use_rslora": True}, {"r": 48}, {"use_dora": True}]
)
def test_milora(fields: dict[str, Any], llama: TinyBase, tmp_path: Path) -> None:
    compiled = assert_equals(llama, make_milora(llama.folder, tmp_path / "milora", **fields))
    assert compiled.rank == 2 * fields.get("r", 4)


def test_milora_that_is_not_declared_belongs_to_its_residual_base(llama: TinyBase, tmp_path: Path) -> None:
    made = make_milora(llama.folder, tmp_path / "milora")
    assert made.adapter is not None
    model = load(made.model)
    assert_equals(TinyBase(made.model, model.eval(), Base.of(model)), Made(made.adapter, made.model, made.adapter))


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"r": 49}, "r"), ({"lora_bias": True}, "lora_bias"), ({"kasa_config": {}}, "kasa_config")],
)
def test_milora_refused(fields: dict[str, Any], param: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_lora(llama.folder, tmp_path / "a", **{"r": 4, "target_modules": ["q_proj"], **fields})
    edit_config(folder, init_lora_weights="milora")
    assert refusal(folder, llama).param == param
