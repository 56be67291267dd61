"""Fuzzing formats that peft has not: a folder a little changed is refused, or is what its method makes of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.adapters.conftest import TinyBase
from tests.adapters.test_method_fuzz import CHANGES, PROMPT, TOLERANCE, change, values
from tests.support.adapters import edit_config
from tests.support.forms import applied
from tests.support.own_formats import load, make_chain, make_lotr, make_milora, make_relora
from weft.adapters.errors import AdapterError
from weft.adapters.methods import compile_adapter

Oracle = Callable[[Path, Path], torch.Tensor | None]
"""The logits of the model that a folder defines, given the base's and it; None where peft cannot make or run it."""

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LINKS: list[dict[str, Any]] = [
    {"r": 3, "bias": "all", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]},
    {"r": 2, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
]


@pytest.fixture(scope="module")
def sound(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind; not to be changed."""
    base, folder = tiny_base("llama").folder, tmp_path_factory.mktemp("sound")
    make_chain(base, folder / "chain", LINKS)
    make_lotr(base, folder / "lotr")
    make_milora(base, folder / "milora")
    make_relora(base, folder / "relora")
    return folder


def refused_or_equal(tiny: TinyBase, sound: Path, edit: Callable[[Path], None], oracle: Oracle) -> None:
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = shutil.copytree(sound, Path(scratch) / "adapter")
        edit(folder)
        try:
            compiled = compile_adapter(folder, tiny.base, version="v")
        except AdapterError as error:
            assert error.message.isprintable() and len(error.message) < 1000
            return
        expected = None if compiled.invocation else oracle(tiny.folder, folder)
        if expected is None:
            return
        with applied(tiny.model, compiled):
            actual = logits(tiny.model)
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * size, equal_nan=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model.eval()(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    return answer


def merged(base: Path, folder: Path) -> torch.Tensor | None:
    model = load(base)
    try:
        for link in json.loads((folder / "adapter_chain.json").read_text())["links"]:
            model = PeftModel.from_pretrained(model, str(folder / link)).merge_and_unload()
        return logits(model)
    except Exception:
        return None


@given(data=st.data())
@EXAMPLES
def test_chains(data: st.DataObject, sound: Path, tiny_base: Callable[[str], TinyBase]) -> None:
    def edit(folder: Path) -> None:
        links = data.draw(st.lists(st.sampled_from(["stage-0", "stage-1"]), min_size=1, max_size=2), "links")
        (folder / "adapter_chain.json").write_text(json.dumps({"links": links}))
        change(folder / data.draw(st.sampled_from(["stage-0", "stage-1"]), "link"), data)

    refused_or_equal(tiny_base("llama"), sound / "chain", edit, merged)


def with_lotr(base: Path, folder: Path) -> torch.Tensor:
    scale = json.loads((folder / "adapter_config.json").read_text()).get("scale", 1.0)
    tensors, model = load_file(folder / "adapter_model.safetensors"), load(base)
    for name in tensors:
        if name.endswith(".lotr.mid"):
            left, mid, right = (tensors[name.replace("mid", part)].float() for part in ("lhs", "mid", "rhs"))
            model.get_submodule(name[: -len(".lotr.mid")]).weight.data += scale / len(mid) * (right @ mid @ left).T
    return logits(model)


@given(data=st.data())
@EXAMPLES
def test_lotr(data: st.DataObject, sound: Path, tiny_base: Callable[[str], TinyBase]) -> None:
    refused_or_equal(tiny_base("llama"), sound / "lotr", lambda folder: change(folder, data), with_lotr)


@given(data=st.data())
@EXAMPLES
def test_milora(data: st.DataObject, sound: Path, tiny_base: Callable[[str], TinyBase]) -> None:
    def oracle(base: Path, folder: Path) -> torch.Tensor | None:
        config = json.loads((folder / "adapter_config.json").read_text())
        declared = config.get("init_lora_weights") == "milora"
        if declared:
            edit_config(folder, init_lora_weights=True)
        model = load(sound / "milora-residual" if declared else base)
        try:
            return logits(PeftModel.from_pretrained(model, str(folder)))
        except Exception:
            return None

    refused_or_equal(tiny_base("llama"), sound / "milora", lambda folder: change(folder, data), oracle)


def with_relora(base: Path, folder: Path) -> torch.Tensor:
    config = json.loads((folder / "relora_config.json").read_text())
    tensors, model = load_file(folder / "model.safetensors"), load(base)
    for name in list(tensors):
        if name.endswith(".lora_A.weight"):
            a, b = tensors.pop(name).float(), tensors.pop(name.replace("lora_A", "lora_B")).float()
            weight = name.replace("lora_A.", "")
            tensors[weight] = tensors[weight].float() + config["lora_alpha"] / len(a) * b @ a
    model.load_state_dict(tensors, strict=True)
    return logits(model)


@given(data=st.data())
@EXAMPLES
def test_relora(data: st.DataObject, sound: Path, tiny_base: Callable[[str], TinyBase]) -> None:
    def edit(folder: Path) -> None:
        path = folder / data.draw(st.sampled_from(["relora_config.json", "config.json"]))
        fields = json.loads(path.read_text())
        for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2), "fields"):
            fields[name] = data.draw(values, name)
        path.write_text(json.dumps(fields))
        if data.draw(st.booleans(), "tensors"):
            tensors, edit = load_file(folder / "model.safetensors"), data.draw(st.sampled_from(CHANGES))
            changed = edit(tensors, data.draw(st.sampled_from(sorted(tensors)), "tensor"))
            save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "model.safetensors")

    refused_or_equal(tiny_base("llama"), sound / "relora", edit, with_relora)
