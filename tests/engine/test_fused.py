"""Norms and feed-forward networks get a fused forward where, and only where, they compute what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from tests.support.models import MIXTURES, VOCAB_SIZE, tiny_model
from weft.adapters.base import Base
from weft.server.engine.fused import fuse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, VOCAB_SIZE)[None], use_cache=False).logits[0].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("arch", "norms", "networks"),
    [("llama", 7, 3), ("gemma2", 13, 3), ("gemma3", 19, 3), ("qwen3", 13, 3), ("olmo2", 13, 3), ("deepseek_v3", 13, 3)],
)
def test_fused_models_say_what_they_said(
    arch: str, norms: int, networks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Norms of layers, of heads and of a latent; shared experts among the networks."""
    model = load(tiny_model(arch, tmp_path), dtype)
    base, before = Base.of(model), logits(model)
    fused = fuse(model, base)
    assert len(base.norms) == norms and fused >= base.norms.keys()
    assert len(fused) == norms + networks
    if arch not in MIXTURES or dtype == torch.float32:  # rounding may choose another expert
        apart = (logits(model) - before).norm() / before.norm()
        assert apart <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gpt_neox", "starcoder2"])
def test_layer_norms_and_other_networks_keep_their_own(arch: str, tmp_path: Path) -> None:
    model = load(tiny_model(arch, tmp_path), torch.float32)
    assert not fuse(model, Base.of(model))


def not_squared(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x / x.abs().mean(-1, keepdim=True)


def eps_outside(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


def offset_of_two(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (2.0 + self.weight) * normed


@pytest.mark.parametrize("forward", [not_squared, eps_outside, offset_of_two])
def test_a_norm_with_another_formula_keeps_its_own(
    forward: Callable[..., torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a class name that is known."""
    model = load(tiny_model("llama", tmp_path), torch.float32)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    base = Base.of(model)
    assert not fuse(model, base) & base.norms.keys()


def limited(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


def rounded_once(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gated = self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()
    return self.down_proj(gated.to(x.dtype))


def with_residual(self: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + (0 if residual is None else residual)


@pytest.mark.parametrize("forward", [limited, rounded_once, with_residual])
def test_a_network_with_another_formula_keeps_its_own(
    forward: Callable[..., torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model("llama", tmp_path), torch.bfloat16)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    base = Base.of(model)
    assert fuse(model, base) == base.norms.keys()


def test_an_activation_that_rounds_on_its_way_keeps_its_own(tmp_path: Path) -> None:
    """`gelu_new` is gelu's tanh form, in several operators of 16 bits."""
    folder = tiny_model("gemma2", tmp_path, hidden_activation="gelu_new")
    model = load(folder, torch.bfloat16)
    base = Base.of(model)
    assert fuse(model, base) == base.norms.keys()


def test_a_fused_network_calls_what_stands_in_for_its_linears(tmp_path: Path) -> None:
    model = load(tiny_model("llama", tmp_path), torch.float32)
    fuse(model, Base.of(model))
    before = logits(model)
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Sequential(model.model.layers[1].mlp.up_proj, nn.Tanh()))
    assert (logits(model) - before).abs().max() > 0.1
