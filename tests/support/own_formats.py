"""Adapters in formats that peft has not, each with the model that its method defines, made without weft."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.support.adapters import edit_config, edit_tensors, make_lora
from tests.support.models import load_model


class Made(NamedTuple):
    """An adapter for the base, and what it must equal: a model of its own, with an adapter of peft if there is one."""

    folder: Path
    model: Path
    adapter: Path | None = None


def load(folder: Path) -> Any:
    return load_model(folder)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def make_lotr(
    base: Path, folder: Path, *, scale: float = 3.0, ranks: Sequence[int] = (3, 5), whole: bool = False
) -> Made:
    """LoTR on two kinds of linears, each kind with a rank and with outer factors of its own, which its layers share.

    Args:
        whole: the file is the ``state_dict`` of the model, in which adapted linears lie one module deeper.
    """
    model, generator = load(base), torch.Generator().manual_seed(len(ranks) + whole)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()} if whole else {}
    for kind, rank in zip(("q_proj", "down_proj"), ranks, strict=True):
        shared: dict[str, torch.Tensor] = {}
        for path, linear in model.named_modules():
            if not path.endswith(kind):
                continue
            if not shared:
                shared["lhs"] = torch.randn(rank, linear.out_features, generator=generator)
                shared["rhs"] = torch.randn(linear.in_features, rank, generator=generator) / linear.in_features**0.5
            mid = torch.randn(rank, rank, generator=generator) * 0.3
            tensors |= {f"{path}.lotr.{part}": t.clone() for part, t in {**shared, "mid": mid}.items()}
            for part in ("weight", "bias") if whole else ():
                tensors[f"{path}.linear.{part}"] = tensors.pop(f"{path}.{part}")
            linear.weight += scale / rank * (shared["rhs"] @ mid @ shared["lhs"]).T
    folder.mkdir(parents=True)
    config = {"peft_type": "LOTR", "scale": scale, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Made(folder, save(model, folder.with_name(f"{folder.name}-model")))


def make_chain(base: Path, folder: Path, links: Sequence[dict[str, Any]], *, copies: bool = True) -> Made:
    """LoRAs by peft, each made on the base with those before merged into it by peft.

    Args:
        links: fields of ``LoraConfig``.
        copies: of weights of the base, which peft saves of embeddings and heads unless told not to.
    """
    current, names = base, [f"stage-{number}" for number in range(len(links))]
    for number, fields in enumerate(links):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            link = make_lora(current, folder / names[number], seed=number, scale=0.3, **fields)
            if not copies:
                edit_tensors(link, lambda ts: {n: t for n, t in ts.items() if "base_layer.weight" not in n})
            merged = PeftModel.from_pretrained(load(current), str(link)).merge_and_unload()
        current = save(merged, folder.with_name(f"{folder.name}-model-{number}"))
    (folder / "adapter_chain.json").write_text(json.dumps({"links": names}))
    return Made(folder, current)


@torch.no_grad()
def make_relora(
    base: Path,
    folder: Path,
    *,
    pickled: bool = False,
    fields: dict[str, Any] | None = None,
    change: Callable[[Any], None] = lambda model: None,
) -> Made:
    """A model that ReLoRA has trained: one merge is in its weights, and the next update lies beside them.

    Args:
        fields: of ``relora_config.json``.
        change: what else was trained.
    """
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["attn", "mlp"], **(fields or {})}
    config = {"keep_original_weights": True, "quantize": None, "use_double_quant": False, **config}
    model, generator = load(base), torch.Generator().manual_seed(5)
    change(model)
    rank, tensors, merged = config["r"], {}, {}
    for number, (path, linear) in enumerate(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or not any(key in path for key in config["target_modules"]):
            continue
        width, height = linear.in_features, linear.out_features

        def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * size

        if number % 2:  # half of the layers were merged before
            linear.weight += draw(height, rank, size=0.2) @ draw(rank, width, size=0.2) / width**0.5
        a, b = draw(rank, width, size=width**-0.5), draw(height, rank, size=0.1)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        scale = config["lora_alpha"] / rank
        if config.get("trainable_scaling"):
            tensors[f"{path}.scaling"] = draw(1)
            scale = tensors[f"{path}.scaling"].tanh()
        merged[linear] = scale * b @ a
    tensors |= {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    (folder / "relora_config.json").write_text(json.dumps(config))
    model.config.save_pretrained(folder)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    for linear, update in merged.items():
        linear.weight += update
    return Made(folder, save(model, folder.with_name(f"{folder.name}-model")))


@torch.no_grad()
def make_milora(base: Path, folder: Path, **fields: Any) -> Made:
    """A LoRA trained on the base less the smallest singular components of its targets, which the config declares."""
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **fields}
    model = load(base)
    for path, linear in model.named_modules():
        if path.endswith(tuple(config["target_modules"])):
            u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
            least = slice(len(s) - config["r"], None)
            linear.weight -= u[:, least] @ torch.diag(s[least]) @ v[least]
    residual = save(model, folder.with_name(f"{folder.name}-residual"))
    plain = make_lora(residual, folder.with_name(f"{folder.name}-plain"), **config)
    shutil.copytree(plain, folder)
    edit_config(folder, init_lora_weights="milora")
    return Made(folder, residual, plain)
