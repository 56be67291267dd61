"""Lily: factors shared between layers, whose weights are means over a forward pass."""

from __future__ import annotations

from typing import Any

from peft import LilyConfig, PeftConfig

from tests.adapters.cases.basic import LINEARS, TASK


def _lily(**fields: Any) -> LilyConfig:
    return LilyConfig(**{"task_type": TASK, "r": 4, "scaling": 8.0, **fields})


CASES: dict[str, PeftConfig] = {
    "lily": _lily(num_B=3, stride_A=2, target_modules=LINEARS),
    "lily_default": _lily(r=9, init_weights=False, scaling=-0.5),
    "lily_pattern": _lily(num_B=4, stride_A=3, target_modules=r".*\.(q_proj|o_proj|up_proj)"),
    "lily_all_linear": _lily(num_B=2, stride_A=5, target_modules="all-linear", exclude_modules=["down_proj"]),
    "lily_layers": _lily(num_B=2, stride_A=2, target_modules=["v_proj", "mlp.down_proj"], layers_to_transform=[0, 2]),
    "lily_saved": _lily(
        num_B=2, target_modules=["model.layers.1.mlp.up_proj", "0.self_attn.v_proj"], modules_to_save=["k_proj"]
    ),
}

GPT2_CASES: dict[str, PeftConfig] = {}
"""peft has Lily for no Conv1D."""
