"""Which modules peft adapts by default, by model type: its TRANSFORMERS_MODELS_TO_*_MAPPING, of causal models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Defaults = Mapping[str, tuple[str, ...]]

LORA: Defaults = MappingProxyType(
    {
        "gpt2": ("c_attn",),
        "bloom": ("query_key_value",),
        "opt": ("q_proj", "v_proj"),
        "gptj": ("q_proj", "v_proj"),
        "gpt_neox": ("query_key_value",),
        "gpt_neo": ("q_proj", "v_proj"),
        "llama": ("q_proj", "v_proj"),
        "gpt_bigcode": ("c_attn",),
        "mpt": ("Wqkv",),
        "falcon": ("query_key_value",),
        "codegen": ("qkv_proj",),
        "mistral": ("q_proj", "v_proj"),
        "mixtral": ("q_proj", "v_proj"),
        "stablelm": ("q_proj", "v_proj"),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "gemma": ("q_proj", "v_proj"),
        "gemma2": ("q_proj", "v_proj"),
        "gemma3_text": ("q_proj", "v_proj"),
        "qwen2": ("q_proj", "v_proj"),
        "qwen3": ("q_proj", "v_proj"),
    }
)
"""Also of BOFT, DeLoRA, DEFT, GLoRA, HRA, LoHa, LoKr, MiSS, OFT, Poly, RandLoRA, AdaMSS, RoAd, TinyLoRA, PSOFT, Lily,
GraLoRA, PEANuT, HiRA, SuperTuning and Uni-LoRA."""

NARROW_PHI: Defaults = MappingProxyType({**LORA, "phi": ("q_proj", "v_proj")})
"""Of SHiRA, VeRA, PVeRA and FRoD."""

SPECTRAL: Defaults = MappingProxyType({**LORA, "gpt2": ("mlp.c_proj",), "gpt_bigcode": ("mlp.c_proj",)})
"""Of FourierFT, C3A and WaveFT."""

ADALORA: Defaults = MappingProxyType(
    {
        "gpt2": ("c_attn",),
        "bloom": ("query_key_value",),
        "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "gptj": ("q_proj", "v_proj"),
        "gpt_neox": ("query_key_value",),
        "gpt_neo": ("q_proj", "v_proj"),
        "llama": ("q_proj", "v_proj"),
        "gpt_bigcode": ("c_attn",),
        "gemma": ("q_proj", "v_proj"),
        "gemma2": ("q_proj", "v_proj"),
        "gemma3_text": ("q_proj", "v_proj"),
        "qwen2": ("q_proj", "v_proj"),
        "qwen3": ("q_proj", "v_proj"),
    }
)
"""Also of VB-LoRA."""

_GATED: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")

IA3: Defaults = MappingProxyType(
    {
        "gpt2": ("c_attn", "mlp.c_proj"),
        "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
        "opt": ("q_proj", "k_proj", "fc2"),
        "gptj": ("q_proj", "v_proj", "fc_out"),
        "gpt_neox": ("query_key_value", "dense_4h_to_h"),
        "gpt_neo": ("q_proj", "v_proj", "c_proj"),
        "gpt_bigcode": ("c_attn", "mlp.c_proj"),
        "llama": ("k_proj", "v_proj", "down_proj"),
        "mistral": ("k_proj", "v_proj", "down_proj"),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "falcon": ("query_key_value", "dense_4h_to_h"),
        "phi": ("q_proj", "v_proj", "fc2"),
        "gemma": _GATED,
        "gemma2": _GATED,
        "gemma3_text": _GATED,
        "qwen2": _GATED,
        "qwen3": _GATED,
    }
)

IA3_FEEDFORWARD: Defaults = MappingProxyType(
    {
        "gpt2": ("mlp.c_proj",),
        "bloom": ("mlp.dense_4h_to_h",),
        "opt": ("fc2",),
        "gptj": ("fc_out",),
        "gpt_neox": ("dense_4h_to_h",),
        "gpt_neo": ("c_proj",),
        "gpt_bigcode": ("mlp.c_proj",),
        "llama": ("down_proj",),
        "mistral": ("down_proj",),
        "mixtral": ("w2",),
        "falcon": ("dense_4h_to_h",),
        "phi": ("fc2",),
        "gemma": ("down_proj",),
        "gemma2": ("down_proj",),
        "gemma3_text": ("down_proj",),
        "qwen2": ("down_proj",),
        "qwen3": ("down_proj",),
    }
)

_VALUE: tuple[str, ...] = ("v_proj",)

BEFT: Defaults = MappingProxyType(
    dict.fromkeys(
        (
            "opt",
            "gptj",
            "gpt_neo",
            "llama",
            "mistral",
            "mixtral",
            "phi",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ),
        _VALUE,
    )
)

_PRE_NORMS: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA_NORMS: tuple[str, ...] = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
)

LN_TUNING: Defaults = MappingProxyType(
    {
        "llama": _PRE_NORMS,
        "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "gptj": ("ln_1", "ln_f"),
        "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
        "mistral": _PRE_NORMS,
        "phi": ("input_layernorm", "final_layernorm"),
        "gemma": _PRE_NORMS,
        "gemma2": _GEMMA_NORMS,
        "gemma3_text": _GEMMA_NORMS,
        "qwen2": ("post_attention_layernorm",),
        "qwen3": ("post_attention_layernorm",),
    }
)

_ALL_LINEAR: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")

OSF: Defaults = MappingProxyType(
    {
        "llama": _ALL_LINEAR,
        "mistral": _ALL_LINEAR,
        "mixtral": _ALL_LINEAR,
        "gemma": _ALL_LINEAR,
        "gemma2": _ALL_LINEAR,
        "gemma3_text": _ALL_LINEAR,
        "qwen2": _ALL_LINEAR,
        "qwen3": _ALL_LINEAR,
        "phi": _ALL_LINEAR,
        "gpt2": ("c_attn", "c_proj"),
        "bloom": ("query_key_value", "dense_4h_to_h"),
        "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        "gpt_neox": ("query_key_value", "dense_4h_to_h"),
        "falcon": ("query_key_value", "dense_4h_to_h"),
        "gpt_bigcode": ("c_attn", "c_proj"),
    }
)
"""Where a type is missing, OSF adapts every linear but the head."""
