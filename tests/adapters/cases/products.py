"""Methods whose update is a product: VeRA, PVeRA, LoHa, LoKr, HRA, MiSS, DeLoRA, GraLoRA, RandLoRA, HiRA, DEFT."""

from __future__ import annotations

import warnings
from typing import Any

from peft import (
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeftConfig,
    PveraConfig,
    RandLoraConfig,
    VeraConfig,
)

from tests.adapters.cases.basic import GPT2_LINEARS, LINEARS


def _unsaved(config: type[PeftConfig], **fields: Any) -> PeftConfig:
    """A config whose random projections are drawn again, of which peft warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(save_projection=False, **fields)


ONE_LAYER = r".*layers\.1\..*(q_proj|up_proj)"
EXCEPTIONS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 9, "^model.layers.0.mlp.up_proj$": 1},
    "alpha_pattern": {"v_proj": 40, r".*\.2\..*down_proj": 3},
}

VERA: dict[str, PeftConfig] = {
    "vera": VeraConfig(r=12, target_modules=LINEARS, d_initial=0.4),
    "vera_wide": VeraConfig(d_initial=0.2),
    "vera_unsaved": _unsaved(VeraConfig, r=10, target_modules=LINEARS, projection_prng_key=7),
    "vera_all_linear": VeraConfig(r=8, target_modules="all-linear"),
    "vera_bias": VeraConfig(r=6, target_modules=["q_proj", "down_proj"], bias="vera_only"),
    "vera_layers": VeraConfig(
        r=16, target_modules=["k_proj", "o_proj"], layers_to_transform=[0, 2], layers_pattern="layers", d_initial=1.0
    ),
    "pvera": PveraConfig(r=12, target_modules=LINEARS, d_initial=0.4),
    "pvera_unsaved": _unsaved(PveraConfig, r=10, target_modules=LINEARS, projection_prng_key=-3, generator_seed=1),
    "pvera_bias": PveraConfig(r=9, bias="all"),
}

LYCORIS: dict[str, PeftConfig] = {
    "loha": LoHaConfig(r=4, alpha=60, target_modules=LINEARS),
    "loha_dense": LoHaConfig(alpha=90),
    "loha_patterns": LoHaConfig(r=2, alpha=20, target_modules=LINEARS, init_weights=False, **EXCEPTIONS),
    "loha_layers": LoHaConfig(r=3, alpha=100, target_modules=["q_proj", "up_proj"], layers_to_transform=1),
    "lokr": LoKrConfig(r=2, target_modules=LINEARS),
    "lokr_whole": LoKrConfig(target_modules=LINEARS),
    "lokr_default_targets": LoKrConfig(r=1, alpha=3),
    "lokr_both": LoKrConfig(r=2, decompose_both=True, alpha=16, target_modules=LINEARS),
    "lokr_first_split_only": LoKrConfig(
        r=6, alpha=20, decompose_both=True, decompose_factor=40, target_modules=["q_proj", "k_proj"]
    ),
    "lokr_factor": LoKrConfig(r=2, decompose_factor=7, init_weights="lycoris", target_modules=LINEARS),
    "lokr_factor_none": LoKrConfig(r=1, decompose_factor=0, alpha=2, target_modules=LINEARS),
    "lokr_factor_beyond": LoKrConfig(r=2, decompose_factor=1000, decompose_both=True, target_modules=["q_proj"]),
    "lokr_patterns": LoKrConfig(r=2, alpha=6, target_modules=LINEARS, init_weights=False, **EXCEPTIONS),
}

REFLECTIONS: dict[str, PeftConfig] = {
    "hra": HRAConfig(r=4, target_modules=LINEARS),
    "hra_odd": HRAConfig(r=5),
    "hra_wide": HRAConfig(r=60, target_modules=ONE_LAYER),
    "hra_gs": HRAConfig(r=4, apply_GS=True, target_modules=LINEARS),
    "hra_gs_wide": HRAConfig(r=40, apply_GS=True, target_modules=["o_proj"]),
    "hra_bias": HRAConfig(r=3, target_modules=["v_proj"], bias="all"),
    "miss": MissConfig(r=8, target_modules=LINEARS),
    "miss_odd": MissConfig(r=7, target_modules=LINEARS, init_weights=False),
    "miss_wide": MissConfig(r=48),
    "miss_mini": MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=LINEARS),
    "miss_mini_odd": MissConfig(r=5, mini_r=8, init_weights="mini", target_modules=LINEARS),
    "miss_bat": MissConfig(r=8, init_weights="bat", target_modules=LINEARS),
    "miss_bias": MissConfig(r=4, bias="MiSS_only", init_weights="bat"),
}

BLOCKS: dict[str, PeftConfig] = {
    "delora": DeloraConfig(r=4, delora_lambda=2, target_modules=LINEARS),
    "delora_no_init": DeloraConfig(r=3, delora_lambda=5, init_weights=False, bias="delora_only"),
    "delora_patterns": DeloraConfig(
        delora_lambda=1, target_modules=LINEARS, rank_pattern={"q_proj": 3}, lambda_pattern={"v_proj": 4}
    ),
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules=LINEARS, alpha=30),
    "gralora_one": GraloraConfig(r=3, gralora_k=1, alpha=9, target_modules=LINEARS),
    "gralora_dense": GraloraConfig(r=8, gralora_k=8, alpha=20, target_modules=LINEARS),
    "gralora_hybrid": GraloraConfig(r=4, gralora_k=2, hybrid_r=3, target_modules=LINEARS, alpha=60),
    "gralora_hybrid_dense": GraloraConfig(hybrid_r=1, bias="gralora_only"),
    "randlora": RandLoraConfig(r=8, randlora_alpha=1, target_modules=LINEARS),
    "randlora_unsaved": _unsaved(RandLoraConfig, r=7, randlora_alpha=1, target_modules=LINEARS),
    "randlora_sparse": _unsaved(
        RandLoraConfig, r=8, randlora_alpha=1, sparse=True, projection_prng_key=5, target_modules=LINEARS
    ),
    "randlora_very_sparse": _unsaved(
        RandLoraConfig, r=9, randlora_alpha=1, very_sparse=True, sparse=True, target_modules=LINEARS
    ),
    "randlora_sparse_saved": RandLoraConfig(r=16, randlora_alpha=2, sparse=True, bias="randlora_only"),
}

OF_THE_BASE: dict[str, PeftConfig] = {
    "hira": HiraConfig(r=4, target_modules=LINEARS),
    "hira_gaussian": HiraConfig(r=2, init_weights="gaussian", rank_pattern={"q_proj": 3}, target_modules=LINEARS),
    "deft": DeftConfig(r=4, target_modules=LINEARS),
    "deft_alpha": DeftConfig(r=4, alpha=10, init_weights=False, init_scale=3.0, target_modules=LINEARS),
    "deft_qr": DeftConfig(r=5, decomposition_method="qr", target_modules=LINEARS),
    "deft_qr_capped": DeftConfig(r=60, alpha=50, decomposition_method="qr", target_modules=["k_proj", "q_proj"]),
    "deft_para": DeftConfig(r=6, para=True, target_modules=LINEARS, bias="deft_only"),
    "deft_qr_para": DeftConfig(decomposition_method="qr", para=True),
}

CASES: dict[str, PeftConfig] = VERA | LYCORIS | REFLECTIONS | BLOCKS | OF_THE_BASE

GPT2_CASES: dict[str, PeftConfig] = {
    "vera": VeraConfig(r=12, target_modules=GPT2_LINEARS),
    "vera_unsaved": _unsaved(VeraConfig, r=12),
    "pvera": PveraConfig(r=12, target_modules=GPT2_LINEARS),
    "gralora": GraloraConfig(r=4, hybrid_r=2, target_modules=GPT2_LINEARS),
    "randlora": RandLoraConfig(r=8, randlora_alpha=1, target_modules=GPT2_LINEARS),
    "randlora_unsaved": _unsaved(RandLoraConfig, r=8, randlora_alpha=1, bias="randlora_only"),
    "hira": HiraConfig(r=4, target_modules=GPT2_LINEARS),
    "deft": DeftConfig(r=4, target_modules=GPT2_LINEARS),
    "deft_qr": DeftConfig(r=4, alpha=8, decomposition_method="qr", bias="deft_only"),
}
