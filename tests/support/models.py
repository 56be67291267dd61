"""Tiny random base models of every served architecture, saved as Hugging Face checkpoints.

``tiny_model("llama", tmp_path / "base")`` writes a folder that ``AutoModelForCausalLM.from_pretrained`` reads. The
weights are large enough that the greedy tokens depend on the prompt, and the logits stay O(10).
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Head sizes are even (rotary embeddings) but no powers of two, and q is not as wide as the hidden size where the
# architecture allows it.
_LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_OWN_HEAD_DIM: dict[str, Any] = {**_LLAMA_SHAPE, "head_dim": 20}


def _experts(count: str) -> dict[str, Any]:
    return {count: 5, "num_experts_per_tok": 2}


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_OWN_HEAD_DIM, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_OWN_HEAD_DIM, "sliding_window": 8}),
    "qwen2": ("qwen2", _LLAMA_SHAPE),
    "qwen3": ("qwen3", {**_OWN_HEAD_DIM, "attention_bias": True}),
    "phi3": ("phi3", {**_LLAMA_SHAPE, "sliding_window": None, "original_max_position_embeddings": 512}),
    "gemma2": ("gemma2", {**_OWN_HEAD_DIM, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        {
            **_OWN_HEAD_DIM,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "opt": (
        "opt",
        {
            "hidden_size": 48,
            "ffn_dim": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 48,
            "intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "rotary_pct": 0.5,
        },
    ),
    "olmo2": ("olmo2", _LLAMA_SHAPE),
    "granite": (
        "granite",
        {
            **_LLAMA_SHAPE,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "starcoder2": ("starcoder2", {**_LLAMA_SHAPE, "sliding_window": None, "use_bias": True}),
    "mixtral": ("mixtral", {**_OWN_HEAD_DIM, **_experts("num_local_experts"), "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_OWN_HEAD_DIM,
            **_experts("num_experts"),
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_OWN_HEAD_DIM,
            **_experts("num_local_experts"),
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "swiglu_limit": 2.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
            "attention_bias": True,
        },
    ),
    "olmoe": ("olmoe", {**_LLAMA_SHAPE, **_experts("num_experts")}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_LLAMA_SHAPE,
            **_experts("num_experts"),
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LLAMA_SHAPE,
            "num_key_value_heads": 4,
            **_experts("n_routed_experts"),
            "moe_intermediate_size": 40,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 20,
        },
    ),
}

MIXTURES: tuple[str, ...] = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe", "deepseek_v3")
"""Those with experts."""

ARCHITECTURES: tuple[str, ...] = tuple(name for name in _CONFIGS if name not in MIXTURES)
"""The others."""


def tiny_model(arch: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a random model of architecture ``arch`` to ``folder`` and return ``folder``.

    Args:
        arch: one of ``ARCHITECTURES`` or ``MIXTURES``.
        seed: of the weights; two models of one seed and configuration are equal.
        dtype: of the saved weights.
        overrides: fields of the transformers config, e.g. ``num_hidden_layers=1`` or ``tie_word_embeddings=True``.

    There is no tokenizer: tests speak in token ids below ``VOCAB_SIZE``. Token 1 is the end of sequence.
    """
    model_type, fields = _CONFIGS[arch]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    model.to(dtype).save_pretrained(folder)
    return folder


State = tuple[tuple[str, int, int], ...]


def state_of(folder: Path) -> State:
    """Names, times and sizes of the files in ``folder``: equal as long as nobody writes there."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)


def load_model(folder: Path, *, eager: bool = False) -> Any:
    """The model in ``folder`` in fp32, as ``AutoModelForCausalLM`` loads it; a copy that the caller may change.

    Args:
        eager: with attention as the architecture writes it down, else as transformers chooses.
    """
    return copy.deepcopy(_loaded(folder, state_of(folder), eager))


@lru_cache(maxsize=32)
def _loaded(folder: Path, state: State, eager: bool) -> Any:
    """Kept, since reading takes five times as long as copying."""
    how = {"attn_implementation": "eager"} if eager else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw every parameter anew: products keep the size of their input, norms and biases are not trivial."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    width: int = model.config.hidden_size
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            fan_in = module.in_features if isinstance(module, nn.Linear) else module.nx
            module.weight.normal_(std=1.0 / math.sqrt(fan_in))
            if module.bias is not None:
                module.bias.normal_(std=0.3)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=1.0)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and not name.endswith("_bias"):  # routers and experts
                    is_transposed = getattr(module, "is_transposed", False)
                    fan_in = parameter.shape[-2 if is_transposed else -1]
                    parameter.normal_(std=(4.0 if parameter.ndim == 2 else 1.0) / math.sqrt(fan_in))
                    continue
                gain = _norm_gain(name, parameter, width)
                parameter.normal_(mean=gain, std=0.2)
    # Logits of about 3 in size; where the head is tied, the embedding must not drown what the layers add to it.
    scaled = any(hasattr(module, "embed_scale") for module in model.modules())
    tied = head.weight is embedding.weight
    head.weight.normal_(std=(1.0 if tied and scaled else 3.0) / math.sqrt(width))


def _norm_gain(name: str, parameter: torch.Tensor, width: int) -> float:
    """Mean of a norm's parameter: 0 for biases, 1 for gains.

    Gemma stores gains as an offset from 1 (they start at 0) and scales the embeddings up by sqrt(width): its sublayers
    get a gain of 3 to matter beside them.
    """
    if name == "bias":
        return 0.0
    stored_as_offset = bool((parameter == 0).all())
    if stored_as_offset:
        return 2.0 if parameter.numel() == width else 0.0
    return 1.0
