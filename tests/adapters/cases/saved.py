"""Every method with modules that are trained in full beside it: norms, the embedding, the head, linear layers."""

from __future__ import annotations

from copy import deepcopy

from peft import IA3Config, LoraConfig, PeftConfig

from tests.adapters.cases import basic, lora_kinds, products, spectra, tasks
from tests.adapters.cases.basic import GPT2_LINEARS, TASK

WHOLE = (["input_layernorm", "model.norm"], ["embed_tokens"], ["lm_head", "post_attention_layernorm"])


def _one_of_each() -> dict[str, PeftConfig]:
    """The first case of every method that trains neither norms nor the embedding, with other modules each time."""
    chosen: dict[str, PeftConfig] = {}
    methods = {"LN_TUNING", "TRAINABLE_TOKENS"}
    for name, config in {**basic.CASES, **products.CASES, **spectra.CASES, **lora_kinds.CASES, **tasks.CASES}.items():
        if config.peft_type.value not in methods:
            methods.add(config.peft_type.value)
            chosen[f"{name}_saved"] = copy = deepcopy(config)
            copy.modules_to_save = list(WHOLE[len(chosen) % len(WHOLE)])
    return chosen


CASES: dict[str, PeftConfig] = {
    **_one_of_each(),
    "ia3_saved_block": IA3Config(target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["1.mlp"]),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "lora_saved_tied": LoraConfig(
        task_type=TASK, target_modules=GPT2_LINEARS, modules_to_save=["wte"], fan_in_fan_out=True
    ),
    "lora_saved_head": LoraConfig(
        task_type=TASK, target_modules=["c_fc"], modules_to_save=["lm_head", "ln_1"], fan_in_fan_out=True
    ),
}
