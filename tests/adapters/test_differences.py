"""Sparse differences in the file that LT-SFT saves: against a base whose parameters were changed by hand."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.forms import applied
from weft.adapters.methods import compile_adapter
from weft.adapters.store import Store

PROMPT = [5, 17, 3, 120, 44, 9, 77, 31]
Q = "model.layers.1.self_attn.q_proj"


def encoded(difference: torch.Tensor) -> dict[str, Any]:
    """Places counted down the columns, as steps, of which the first is one of numpy's integers."""
    columns = (difference.T if difference.ndim == 2 else difference).flatten()
    places = columns.nonzero()[:, 0]
    steps = places.diff(prepend=places.new_zeros(1)).tolist()
    steps = [np.int64(steps[0]), *steps[1:]]
    return {"size": difference.size(), "index_steps": steps, "values": columns[places].clone()}


def sparse(shape: torch.Size, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape, generator=generator) < 0.1
    chosen.view(-1)[0] = True
    return torch.randn(shape, generator=generator) * chosen * scale


def write(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "pytorch_diff.bin")
    return folder


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_equals_the_changed_base(arch: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    tiny = tiny_base(arch)
    assert tiny.base.embedding is not None
    changed = deepcopy(tiny.model)
    names = [name for name, p in changed.named_parameters() if tiny.base.module(name.rpartition(".")[0]) is not None]
    whole = next(name for name in names if name.endswith("1.mlp.down_proj.weight") or "1.mlp.c_proj.weight" in name)
    content: dict[str, Any] = {"diffs": {}, "abs": {}}
    with torch.no_grad():
        for seed, name in enumerate(names):
            parameter = changed.get_parameter(name)
            difference = sparse(parameter.shape, seed, 0.3)
            parameter += difference
            if name == whole:
                content["abs"][name] = parameter.detach().clone()
            else:
                content["diffs"][name] = encoded(difference)
        folder = write(tmp_path / "adapter", content)
        version = Store(tmp_path / "store").add(folder)
        compiled = compile_adapter(Store(tmp_path / "store").path(version), tiny.base, version="v")
        expected = changed(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
        with applied(tiny.model, compiled):
            actual = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
        plain = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * size)
    assert float((plain - expected).abs().max()) > 0.02 * size


class Command:
    """What a pickle can do when nobody looks."""

    def __reduce__(self) -> Any:
        return print, ("run",)


class Large:
    def __reduce__(self) -> Any:
        return bytearray, (1 << 40,)


def entry(llama: TinyBase, **change: Any) -> dict[str, Any]:
    one = encoded(sparse(llama.base.parameters[f"{Q}.weight"].shape, 1))
    return {"diffs": {f"{Q}.weight": one | change}, "abs": {}}


BROKEN: dict[str, Callable[[TinyBase], object]] = {
    "code": lambda base: {"diffs": {}, "abs": {"x": Command()}},
    "large": lambda base: {"diffs": {}, "abs": {"x": Large()}},
    "no dict": lambda base: [1, 2],
    "empty": lambda base: {"diffs": {}, "abs": {}},
    "another part": lambda base: entry(base) | {"head": {}},
    "unknown parameter": lambda base: {"diffs": {"model.nothing.weight": entry(base)["diffs"][f"{Q}.weight"]}},
    "name": lambda base: {"diffs": {3: 4}},
    "size": lambda base: entry(base, size=torch.Size([1 << 30, 1 << 30])),
    "steps": lambda base: entry(base, index_steps=[1, 2.0]),
    "many steps": lambda base: entry(base, index_steps=[1, 2, 3]),
    "a place twice": lambda base: entry(base, index_steps=[1, 0], values=torch.ones(2)),
    "beyond": lambda base: entry(base, index_steps=[80 * 48], values=torch.ones(1)),
    "not finite": lambda base: entry(base, index_steps=[3], values=torch.tensor([torch.nan])),
    "integers": lambda base: entry(base, index_steps=[3], values=torch.tensor([1])),
    "field": lambda base: entry(base, more=1),
    "whole of another shape": lambda base: {"abs": {f"{Q}.weight": torch.ones(3, 3)}},
    "both": lambda base: entry(base) | {"abs": {f"{Q}.weight": torch.ones(80, 48)}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(case: str, llama: TinyBase, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "adapter", BROKEN[case](llama)), llama)
    assert len(error.message) < 500
    if case in ("code", "large"):
        assert "asks for" in error.message


def test_what_the_cases_above_are_made_of(llama: TinyBase, tmp_path: Path) -> None:
    """Else they would be refused for another reason."""
    forms = compile_adapter(write(tmp_path / "adapter", entry(llama)), llama.base, version="v")
    assert forms.sites.keys() == {Q} and forms.method == "LT-SFT"


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip", bytes(1000)])
def test_no_file_of_torch(content: bytes, llama: TinyBase, tmp_path: Path) -> None:
    (tmp_path / "pytorch_diff.bin").write_bytes(content)
    assert refusal(tmp_path, llama).param == "pytorch_diff.bin"


def test_compressed(llama: TinyBase, tmp_path: Path) -> None:
    """A small file must not become a large one in memory."""
    folder = write(tmp_path / "adapter", entry(llama))
    path = folder / "pytorch_diff.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert refusal(folder, llama).param == "pytorch_diff.bin"


def test_beside_a_config_it_is_ignored(llama: TinyBase, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", entry(llama))
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_model.safetensors" in refusal(folder, llama).message
