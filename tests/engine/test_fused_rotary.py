"""Attention rotates with the kernel where, and only where, its own function computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from tests.engine.test_fused import DTYPES, load, logits
from tests.support.models import tiny_model
from weft.server.engine import fused_rotary
from weft.server.engine.fused_rotary import fuse_rotary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "qwen3", "olmo2", "gpt_neox", "phi3"])
def test_fused_models_say_what_they_said(
    arch: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model(arch, tmp_path), dtype)
    before, calls = logits(model), []

    def counted(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        return rotary(*args)

    rotary = fused_rotary.rotary
    monkeypatch.setattr(fused_rotary, "rotary", counted)
    fused = fuse_rotary(model)
    after = logits(model)
    # A model may rotate in fp32 what it computes in 16 bits: that is left to its own function.
    assert len(fused) == model.config.num_hidden_layers
    assert len(calls) in (0, len(fused)) and (calls or arch != "llama")
    apart = (after - before).norm() / before.norm()
    assert apart <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("kind", ["cohere", "glm4", "gpt2"])
def test_those_that_rotate_otherwise_keep_their_own(kind: str) -> None:
    """Pairs of neighbours, or no rotation at all."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, vocab_size=64, head_dim=16, intermediate_size=32, pad_token_id=0, **shape)
    assert not fuse_rotary(AutoModelForCausalLM.from_config(config))


def test_what_the_kernel_does_not_take_goes_to_the_models_own_function(tmp_path: Path) -> None:
    model = load(tiny_model("llama", tmp_path), torch.float32)
    fuse_rotary(model)
    rotate = model.model.layers[0].self_attn.forward.__func__.__globals__[fused_rotary.NAME]
    q, k, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8), torch.randn(2, 5, 8)
    for more, named in (((2,), {}), ((), {"unsqueeze_dim": 2})):
        for ours, theirs in zip(
            rotate(q, k, angles, angles, *more, **named),
            modeling_llama.apply_rotary_pos_emb(q, k, angles, angles, unsqueeze_dim=2),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_transformers_own_function_stays_where_it_is(tmp_path: Path) -> None:
    own, folder = modeling_llama.apply_rotary_pos_emb, tiny_model("llama", tmp_path)
    other = load(folder, torch.float32)
    assert fuse_rotary(load(folder, torch.float32))
    assert modeling_llama.apply_rotary_pos_emb is own
    assert all("forward" not in vars(module) for module in other.modules())
