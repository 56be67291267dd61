"""ShadowPEFT: small networks beside the base of every shape that peft builds."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, ShadowConfig

from tests.adapters.cases.basic import TASK


def _shadow(**fields: Any) -> ShadowConfig:
    return ShadowConfig(**{"task_type": TASK, "r": 4, "shadow_alpha": 1.5, **fields})


CASES: dict[str, PeftConfig] = {
    "shadow": _shadow(),
    "shadow_own_embeddings": _shadow(share_embeddings=False, update_hidden_size=60, r=7),
    "shadow_narrow": _shadow(
        shadow_hidden_size=24, shadow_num_hidden_layers=2, shadow_num_attention_heads=2, shadow_intermediate_size=20
    ),
    "shadow_deep": _shadow(shadow_num_hidden_layers=4, shadow_intermediate_size=52),
    "shadow_last_layers": _shadow(target_modules=["layers.1", "layers.2"], exclude_modules=["layers.0"], r=1),
    "shadow_one_layer": _shadow(target_modules=r".*\.layers\.1", shadow_alpha=-3.0),
    "shadow_in_full": _shadow(target_modules=["model.layers.0", "model.layers.1"], layers_to_transform=[2]),
    "shadow_saved_head": _shadow(modules_to_save=["lm_head"]),
    "shadow_saved_embedding": _shadow(modules_to_save=["embed_tokens", "model.norm"], task_type=None),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "shadow": _shadow(),
    "shadow_own_embeddings": _shadow(share_embeddings=False, update_hidden_size=9),
    "shadow_narrow": _shadow(shadow_hidden_size=24, shadow_num_hidden_layers=2, shadow_intermediate_size=20),
    "shadow_last_layers": _shadow(target_modules=["h.1", "h.2"], modules_to_save=["lm_head"]),
}
