"""AdaLoRA, IA3, LayerNorm tuning, and fully trained modules beside them."""

from __future__ import annotations

from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PeanutConfig, PeftConfig, TrainableTokensConfig

TASK = "CAUSAL_LM"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]

CASES: dict[str, PeftConfig] = {
    "adalora": AdaLoraConfig(init_r=6, target_r=4, total_step=10, lora_alpha=20, target_modules=LINEARS),
    "adalora_default_targets": AdaLoraConfig(total_step=10, lora_alpha=200),
    "adalora_no_alpha": AdaLoraConfig(init_r=4, total_step=10, lora_alpha=0, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj", "up_proj"]),
    "ia3_default_targets": IA3Config(),
    "ia3_modules_to_save": IA3Config(modules_to_save=["model.norm"]),
    "ln_tuning": LNTuningConfig(),
    "ln_tuning_some": LNTuningConfig(target_modules=["input_layernorm"], modules_to_save=["lm_head"]),
    "lora_modules_to_save": LoraConfig(task_type=TASK, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
    "lora_saved_linear": LoraConfig(task_type=TASK, target_modules=["q_proj"], modules_to_save=["0.mlp"]),
    "trainable_tokens": TrainableTokensConfig(token_indices=[44, 5, 9], task_type=TASK),
    "trainable_tokens_head": TrainableTokensConfig(token_indices=[7, 3], target_modules=["lm_head"], task_type=TASK),
    "lora_trainable_tokens": LoraConfig(
        task_type=TASK, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 120], "lm_head": [3]}
    ),
    "lora_token_list": LoraConfig(task_type=TASK, target_modules=["q_proj"], trainable_token_indices=[77, 31, 5]),
    "lora_embedding": LoraConfig(task_type=TASK, lora_alpha=30, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "dora_embedding": LoraConfig(task_type=TASK, target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "lora_saved_embedding": LoraConfig(
        task_type=TASK, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "peanut": PeanutConfig(r=4, depth=2, scaling=3.0, target_modules=LINEARS),
    "peanut_shallow": PeanutConfig(r=3, act_fn="gelu", scaling=10.0),
    "ia3_patterns": IA3Config(target_modules=r".*(k_proj|down_proj)", feedforward_modules=r".*\.1\..*down_proj"),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "adalora": AdaLoraConfig(init_r=6, total_step=10, target_modules=GPT2_LINEARS),
    "ia3": IA3Config(),
    "ln_tuning": LNTuningConfig(),
    "trainable_tokens": TrainableTokensConfig(token_indices=[44, 5, 9], target_modules=["wte"], task_type=TASK),
    "lora_tied_tokens": LoraConfig(
        task_type=TASK, target_modules=["c_attn"], trainable_token_indices=[17, 3, 120], fan_in_fan_out=True
    ),
    "lora_bias_all": LoraConfig(task_type=TASK, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "lora_saved": LoraConfig(
        task_type=TASK, target_modules=["c_attn"], modules_to_save=["ln_f", "mlp.c_proj"], fan_in_fan_out=True
    ),
}
