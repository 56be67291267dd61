"""MoRA and MELoRA, which were published in forks of peft: the loader against the forks' own arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.adapters import edit_config, edit_tensors
from weft.adapters.forms import SiteForms
from weft.adapters.methods import compile_adapter

PATHS = {"q_proj": "model.layers.1.self_attn.q_proj", "down_proj": "model.layers.0.mlp.down_proj"}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def update(forms: SiteForms, x: torch.Tensor) -> torch.Tensor:
    if forms.delta is not None:
        return x @ forms.delta.T
    assert forms.low_rank is not None
    return x @ forms.low_rank.a.T @ forms.low_rank.b.T


def mora(x: torch.Tensor, square: torch.Tensor, kind: int, height: int) -> torch.Tensor:
    """What the fork computes for rows ``x``, element by element: sums of the input, the square, repetitions."""
    rank, width = len(square), x.shape[1]
    padded = torch.cat([x, x[:, : -width % rank]], dim=1)
    rows = []
    for row, whole in zip(x, padded, strict=True):
        parts = [whole[at : at + rank] for at in range(0, len(whole), rank)]
        if kind == 6:
            outputs = []
            for position, part in enumerate(parts):
                halves = zip(part[: rank // 2].tolist(), part[rank // 2 :].tolist(), strict=True)
                turned = [complex(a, b) for a, b in halves]
                angles = [position / 10000 ** (2 * i / rank) for i in range(rank // 2)]
                turned = [z * complex(math.cos(t), math.sin(t)) for z, t in zip(turned, angles, strict=True)]
                outputs.append(square @ torch.tensor([z.real for z in turned] + [z.imag for z in turned]))
            rows.append([float(torch.cat(outputs)[i % (rank * len(parts))]) for i in range(height)])
            continue
        if kind in (1, 4):
            inner = sum(parts, torch.zeros(rank))
        else:
            inner = torch.stack([group.sum() for group in row.tensor_split(rank)])
        outer = square @ inner
        if kind in (1, 3):
            rows.append([float(outer[i % rank]) for i in range(height)])
        else:
            groups = torch.arange(height).tensor_split(rank)
            rows.append([float(outer[g]) for g, group in enumerate(groups) for _ in group])
    return torch.tensor(rows)


def mora_folder(llama: TinyBase, folder: Path, r: int, **fields: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    squares = {}
    for path in PATHS.values():
        site = llama.base.sites[path]
        rank = int(math.sqrt((site.in_features + site.out_features) * r) + 0.5)
        squares[path] = torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank))
    tensors = {f"{path}.lora_{which}.weight": t.clone() for path, t in squares.items() for which in "AB"}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 77, "use_mora": True, "target_modules": list(PATHS.values())}
    return write(folder, {**config, **fields}, tensors), squares


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_mora(kind: int, r: int, llama: TinyBase, tmp_path: Path) -> None:
    folder, squares = mora_folder(llama, tmp_path / "adapter", r, mora_type=kind)
    if kind == 6 and any(len(square) % 2 for square in squares.values()):
        assert refusal(folder, llama).param == "r"  # the fork fails there
        return
    compiled = compile_adapter(folder, llama.base, version="v")
    assert compiled.sites.keys() == squares.keys()
    for path, square in squares.items():
        site = llama.base.sites[path]
        x = torch.randn(3, site.in_features)
        expected = mora(x, square, kind, site.out_features)
        torch.testing.assert_close(update(compiled.sites[path], x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"mora_type": 5}, "mora_type"), ({"mora_type": True}, "mora_type"), ({"bias": "all"}, "bias"),
     ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"use_mora": 1}, "use_mora"),
     ({"r": 3}, None), ({"use_mora": False, "mora_type": 2}, "mora_type")],
)  # fmt: skip
def test_mora_refused(fields: dict[str, Any], param: str | None, llama: TinyBase, tmp_path: Path) -> None:
    folder, _ = mora_folder(llama, tmp_path / "adapter", 2, mora_type=1)
    edit_config(folder, **fields)
    assert param in (None, refusal(folder, llama).param)
    refusal(folder, llama)


def test_mora_of_two_squares(llama: TinyBase, tmp_path: Path) -> None:
    folder, _ = mora_folder(llama, tmp_path / "adapter", 2)
    compile_adapter(folder, llama.base, version="v")
    name = f"base_model.model.{PATHS['q_proj']}.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors | {name: tensors[name] + 1})
    assert refusal(folder, llama).param == name


def melora_folder(llama: TinyBase, folder: Path, ranks: list[int]) -> Path:
    tensors = {}
    for path in PATHS.values():
        site = llama.base.sites[path]
        for i, rank in enumerate(ranks):
            tensors[f"{path}.lora_A.{i}.weight"] = torch.randn(rank, site.in_features // len(ranks))
            tensors[f"{path}.lora_B.{i}.weight"] = torch.randn(site.out_features // len(ranks), rank)
    alphas = [16 + i for i in range(len(ranks))]
    config = {"peft_type": "MELORA", "r": ranks, "lora_alpha": alphas, "mode": "me", "bias": "none"}
    return write(folder, {**config, "target_modules": list(PATHS)}, tensors)


def test_melora(llama: TinyBase, tmp_path: Path) -> None:
    ranks = [1, 4, 2]  # 88 inputs are no multiple of 3: the last is seen by no part
    folder = melora_folder(llama, tmp_path / "adapter", ranks)
    edit_config(folder, target_modules=["layers.0.mlp.down_proj"])
    path = PATHS["down_proj"]
    edit_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if "down_proj" in name})
    saved: dict[str, torch.Tensor] = {}
    edit_tensors(folder, lambda tensors: saved.update(tensors) or tensors)
    compiled = compile_adapter(folder, llama.base, version="v")
    x = torch.randn(5, 88)
    outputs = []
    for i, rank in enumerate(ranks):
        a, b = (saved[f"base_model.model.{path}.lora_{which}.{i}.weight"] for which in "AB")
        outputs.append((16 + i) / rank * x[:, i * 29 : (i + 1) * 29] @ a.T @ b.T)
    torch.testing.assert_close(update(compiled.sites[path], x), torch.cat(outputs, dim=1), rtol=1e-4, atol=1e-4)
    assert compiled.rank == sum(ranks)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"r": 4}, "r"), ({"r": []}, "r"), ({"r": [1, 0]}, "r"), ({"r": [1, 2, 2]}, "r"), ({"bias": "all"}, "bias"),
     ({"lora_alpha": [1, "x"]}, "lora_alpha"), ({"layers_to_transform": [0]}, "layers_to_transform")],
)  # fmt: skip
def test_melora_refused(fields: dict[str, Any], param: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = melora_folder(llama, tmp_path / "adapter", [1, 2])
    edit_config(folder, **fields)
    assert refusal(folder, llama).param == param


def test_melora_with_parts_that_do_not_divide(llama: TinyBase, tmp_path: Path) -> None:
    folder = melora_folder(llama, tmp_path / "adapter", [1] * 7)
    assert refusal(folder, llama).param == "r"
