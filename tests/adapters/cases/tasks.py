"""Poly: a task of every request."""

from __future__ import annotations

from peft import PeftConfig, PolyConfig

TASK = "CAUSAL_LM"
"""peft hands the task on to such models alone."""

CASES: dict[str, PeftConfig] = {
    "poly": PolyConfig(
        task_type=TASK, r=4, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj", "v_proj", "down_proj"]
    ),
    "poly_default_targets": PolyConfig(task_type=TASK, n_tasks=2, init_weights=False),
    "poly_dense": PolyConfig(task_type=TASK, r=40, n_tasks=2, n_skills=1, n_splits=4, target_modules="all-linear"),
}
GPT2_CASES: dict[str, PeftConfig] = {}
