"""LoRA's variants: trained on a base less a part of itself, with packed factors, or with extras for training alone."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.adapters.cases.basic import GPT2_LINEARS, LINEARS, TASK


def _lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": TASK, "r": 4, "lora_alpha": 12, "target_modules": LINEARS, **fields})


OUTPUTS = ["o_proj", "down_proj"]
INPUTS = [name for name in LINEARS if name not in OUTPUTS]

CASES: dict[str, PeftConfig] = {
    "pissa": _lora(init_lora_weights="pissa"),
    "pissa_dora": _lora(init_lora_weights="pissa", use_dora=True, rank_pattern={"q_proj": 7}),
    "pissa_head": _lora(init_lora_weights="pissa", target_modules=["lm_head", "v_proj"]),
    "olora": _lora(init_lora_weights="olora", alpha_pattern={"v_proj": -3}),
    "kasa": _lora(kasa_config=KasaConfig()),
    "kasa_bias": _lora(kasa_config=KasaConfig(), lora_bias=True, r=9, target_modules=["k_proj", "up_proj"]),
    "bdlora": _lora(use_bdlora=BdLoraConfig(OUTPUTS, INPUTS, nblocks=4), r=8),
    "bdlora_some": _lora(use_bdlora=BdLoraConfig(None, ["1.mlp"], nblocks=2, match_strict=False)),
    "bdlora_pissa": _lora(use_bdlora=BdLoraConfig(["down"], nblocks=2, match_strict=False), init_lora_weights="pissa"),
    "qalora": _lora(use_qalora=True, qalora_group_size=8),
    "velora": _lora(velora_config=VeloraConfig(num_groups=5)),
    "velora_random": _lora(velora_config=VeloraConfig(num_groups=8, init_type="random"), init_lora_weights="olora"),
    "monteclora": _lora(monteclora_config=MontecloraConfig(num_samples=2)),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "pissa": _lora(init_lora_weights="pissa", target_modules=GPT2_LINEARS, fan_in_fan_out=True),
    "olora": _lora(init_lora_weights="olora", target_modules=["attn.c_proj"], fan_in_fan_out=True),
    "velora": _lora(
        velora_config=VeloraConfig(num_groups=4), target_modules=GPT2_LINEARS, fan_in_fan_out=True, lora_alpha=40
    ),
}
