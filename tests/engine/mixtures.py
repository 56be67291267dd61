"""LoRA variants of a mixture of experts: attention, router and experts, as ``target_parameters`` reaches them."""

from __future__ import annotations

from typing import Any

ROUTERS = {"gpt_oss": "mlp.router.weight"}


def mixture_variants(arch: str) -> dict[str, dict[str, Any]]:
    """Configurations for ``peft.LoraConfig``, of different ranks, targets and options."""
    router = ROUTERS.get(arch, "mlp.gate.weight")
    up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    attention = ["kv_b_proj", "o_proj"] if arch == "deepseek_v3" else ["q_proj", "v_proj", "o_proj"]
    alone: dict[str, Any] = {"lora_alpha": 8, "target_modules": []}
    variants = {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": attention},
        "router": {**alone, "r": 3, "target_parameters": [router]},
        "gate-up": {**alone, "r": 2, "target_parameters": [up]},
        "down": {**alone, "r": 5, "use_rslora": True, "target_parameters": [down]},
        "experts": {**alone, "r": 4, "target_parameters": [down, up]},
        "short-names": {**alone, "r": 1, "target_parameters": ["down_proj", "gate_up_proj"]},
        "weights": {**alone, "r": 6, "target_parameters": [f"{attention[-1]}.weight", router]},
        "all": {
            "r": 7,
            "lora_alpha": 9,
            "target_modules": attention,
            "target_parameters": [up, down, router],
            "rank_pattern": {"gate_up_proj": 3, "mlp.experts.down_proj": 2, attention[0]: 1, r"layers.0.*weight": 4},
            "alpha_pattern": {"down_proj": 5, r"layers.2\..*gate_up_proj": 2.5},
            "layers_to_transform": [0, 2],
        },
    }
    if arch != "deepseek_v3":  # its router has a buffer besides, which peft saves with it: refused
        variants["saved-router"] = {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": attention,
            "modules_to_save": [router.split(".")[1]],
        }
    return variants
