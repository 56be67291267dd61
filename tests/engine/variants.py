"""Every LoRA variant weft serves, as configurations for each architecture."""

from __future__ import annotations

from typing import Any

# (attention projections, feed-forward projections), as the architecture names its modules.
_PROJECTIONS: dict[str, tuple[list[str], list[str]]] = {
    "phi3": (["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]),
    "gpt2": (["c_attn"], ["c_fc"]),
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]),
    "gpt_neox": (["query_key_value"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "starcoder2": (["q_proj", "k_proj", "v_proj", "o_proj"], ["c_fc", "c_proj"]),
}
_LLAMA = (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
_LAYERS = {"gpt2": "h"}
_HEAD = {"gpt_neox": "embed_out"}


def lora_variants(arch: str) -> dict[str, dict[str, Any]]:
    """Nine configurations for ``peft.LoraConfig``, of different ranks, targets and options."""
    attention, feed_forward = _PROJECTIONS.get(arch, _LLAMA)
    first, last = attention[0], feed_forward[-1]
    layers = _LAYERS.get(arch, "layers")
    fan_in = {"fan_in_fan_out": True} if arch == "gpt2" else {}
    common: dict[str, Any] = {"lora_alpha": 8, **fan_in}
    return {
        "all-linear": {**common, "r": 4, "target_modules": "all-linear"},
        "rank-1": {**common, "r": 1, "target_modules": attention},
        "rslora": {**common, "r": 16, "use_rslora": True, "target_modules": [*attention, *feed_forward]},
        "patterns": {
            **common,
            "r": 8,
            "target_modules": [*attention, *feed_forward],
            "rank_pattern": {first: 3, rf"{layers}\.1\..*{last}": 11},
            "alpha_pattern": {first: 5, last: 17.5},
        },
        "some-layers": {
            **common,
            "r": 6,
            "target_modules": attention,
            "layers_to_transform": [0, 2],
            "layers_pattern": layers,
        },
        "excluded": {**common, "r": 5, "target_modules": "all-linear", "exclude_modules": [last]},
        "regex": {**common, "r": 32, "target_modules": rf".*{layers}\.[12]\..*({first}|{last})"},
        "lora-bias": {**common, "r": 7, "lora_bias": True, "target_modules": [*attention, *feed_forward]},
        "head": {**common, "r": 10, "target_modules": [first, _HEAD.get(arch, "lm_head")]},
    }
