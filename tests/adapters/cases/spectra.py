"""Methods that train few values of a weight, of its spectrum or of its singular value decomposition."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from peft import (
    AdamssConfig,
    BeftConfig,
    C3AConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    OSFConfig,
    PeftConfig,
    PsoftConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    WaveFTConfig,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]

# torch warns where this is left open, and peft leaves it open in SHiRA and FRoD.
torch.sparse.check_sparse_tensor_invariants.enable()


def unsaved(config: type[PeftConfig], **fields: Any) -> PeftConfig:
    """A config that leaves out of the file what follows from the base and a seed; peft warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(**fields)


ADAMSS: dict[str, PeftConfig] = {}
if find_spec("sklearn"):  # peft cannot even make the config without
    ADAMSS = {
        "adamss": AdamssConfig(r=12, num_subspaces=4, subspace_rank=3, target_modules=LINEARS),
        "adamss_dynamic": AdamssConfig(r=500, subspace_rank=4, use_dynamic_rank=True, random_seed=3),
        "adamss_head": AdamssConfig(r=20, num_subspaces=9, target_modules=["lm_head", "q_proj"]),
    }

CASES: dict[str, PeftConfig] = {
    **ADAMSS,
    "shira": ShiraConfig(r=4, target_modules=LINEARS),
    "shira_seed_default_targets": ShiraConfig(r=3, random_seed=5),
    "supertuning": SupertuningConfig(sparsity=0.9, target_modules=LINEARS),
    "supertuning_smallest": SupertuningConfig(sparsity=0.85, select_top=False),
    "supertuning_unsaved": unsaved(
        SupertuningConfig, sparsity=0.9, save_precomputed_indices=False, target_modules=LINEARS
    ),
    "supertuning_unsaved_smallest": unsaved(
        SupertuningConfig, sparsity=0.9, select_top=False, save_precomputed_indices=False, target_modules=LINEARS
    ),
    "supertuning_lora": SupertuningConfig(sparsity=0.95, r=4, lora_alpha=12, lora_dropout=0.1, target_modules=LINEARS),
    "supertuning_lora_default_alpha": SupertuningConfig(sparsity=0.95, r=3, init_weights=False),
    "fourierft": FourierFTConfig(n_frequency=500, scaling=30.0, target_modules=LINEARS, bias="all"),
    "fourierft_low_rank": FourierFTConfig(
        n_frequency=10, scaling=300.0, random_loc_seed=3, target_modules="all-linear", bias="fourierft_only"
    ),
    "fourierft_patterns": FourierFTConfig(
        n_frequency=300,
        n_frequency_pattern={
            "q_proj": 20,
            "model.layers.0.self_attn.q_proj": 30,
            "model.layers.1.self_attn.v_proj": 40,
            "layers.[12].mlp.up_proj": 50,
            "nothing|v_proj": 7,
        },
        target_modules=["q_proj", "v_proj", "up_proj"],
        scaling=100.0,
    ),
    "fourierft_default_targets": FourierFTConfig(scaling=100.0),
    "c3a": C3AConfig(block_size=8, target_modules=LINEARS, bias="c3a_only"),
    "c3a_patterns": C3AConfig(
        block_size=4,
        block_size_pattern={"q_proj": 16, "model.layers.2.self_attn.v_proj": 2, ".*0.*down_proj": 8},
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[0, 2],
        bias="all",
    ),
    "c3a_default_targets": C3AConfig(block_size=8),
    "waveft": WaveFTConfig(n_frequency=500, scaling=1.0, target_modules=LINEARS, bias="waveft_only"),
    "waveft_no_transform": WaveFTConfig(
        n_frequency=300, scaling=1.0, use_idwt=False, random_loc_seed=5, init_weights=False, bias="all"
    ),
    "waveft_patterns": WaveFTConfig(
        n_frequency=300,
        n_frequency_pattern={"q_proj": 500, "layers.1.self_attn.v_proj": 40},
        target_modules=LINEARS,
        exclude_modules=["k_proj"],
        wavelet_family="db4",
        scaling=1.0,
    ),
    "waveft_proportional": WaveFTConfig(
        n_frequency=2500,
        proportional_parameters=True,
        n_frequency_pattern={"q_proj": 5},
        target_modules=LINEARS,
        wavelet_family="sym5",
        scaling=1.0,
    ),
    "waveft_longest_filter": WaveFTConfig(n_frequency=900, wavelet_family="db10", scaling=1.0),
    "beft": BeftConfig(target_modules=LINEARS),
    "beft_default_targets": BeftConfig(),
    "glora": GloraConfig(r=4, target_modules=LINEARS),
    "glora_vectors": GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", bias="glora_only"),
    "glora_constants": GloraConfig(
        config_A_B="constant", config_C="none", config_D_E="constant", target_modules=LINEARS
    ),
    "glora_biases_only": GloraConfig(config_A_B="none", config_C="lora", config_D_E="none", r=2),
    "glora_some_nothing": GloraConfig(
        config_A_B="none", config_C="vector", config_D_E="constant", target_modules=["lm_head", "o_proj"]
    ),
    "glora_weights_only": GloraConfig(r=2, config_C="none", config_D_E="none", init_weights=False, bias="all"),
    "glora_head_without_bias": GloraConfig(config_A_B="vector", target_modules=["lm_head", "v_proj"]),
    "frod": FrodConfig(target_modules=LINEARS, sparse_rate=0.03, bias="all", progressbar=False),
    "frod_drawn": FrodConfig(
        target_modules=LINEARS, save_projection=False, projection_prng_key=3, init_weights=False, progressbar=False
    ),
    "frod_diagonal": FrodConfig(sparse_rate=0.0, bias="frod_only", progressbar=False),
    "frod_drawn_default_targets": FrodConfig(
        save_projection=False, regularization_alpha=0.1, layers_to_transform=[1, 2], progressbar=False
    ),
    "vblora": VBLoRAConfig(r=4, num_vectors=30, vector_length=8, topk=3, target_modules=LINEARS, bias="vblora_only"),
    "vblora_topk": VBLoRAConfig(
        r=4, num_vectors=30, vector_length=8, save_only_topk_weights=True, target_modules=LINEARS, bias="all"
    ),
    "vblora_many_vectors": VBLoRAConfig(
        r=8, num_vectors=300, vector_length=4, topk=4, save_only_topk_weights=True, target_modules=LINEARS
    ),
    "vblora_topk_of_one": VBLoRAConfig(
        r=4, num_vectors=30, vector_length=8, topk=1, save_only_topk_weights=True, exclude_modules=["k_proj"]
    ),
    "unilora": UniLoraConfig(r=4, theta_d_length=100, target_modules=LINEARS, bias="unilora_only"),
    "unilora_default_targets": UniLoraConfig(
        r=2, theta_d_length=300, proj_seed=5, init_weights=False, layers_to_transform=[0, 2]
    ),
    "unilora_more_than_needed": UniLoraConfig(r=8, theta_d_length=5000, init_weights=False),
    "unilora_saved": UniLoraConfig(r=4, theta_d_length=100, save_indices=True, target_modules=LINEARS, bias="all"),
    "osf": OSFConfig(effective_rank=30, target_modules=LINEARS, rank_pattern={"k_proj": 36, "layers.1.*q_": 0.5}),
    "osf_default_targets": OSFConfig(),
    "osf_all_linear": OSFConfig(effective_rank=20.0, target_modules="all-linear"),
    "osf_everything_kept": OSFConfig(effective_rank=1.0, rank_pattern={"v_proj": 35}),
    "psoft": PsoftConfig(r=16, target_modules=LINEARS),
    "psoft_series": PsoftConfig(
        r=12, psoft_alpha=5, use_cayley_neumann=True, num_cayley_neumann_terms=6, ab_svd_init="pissa_init"
    ),
    "psoft_short_series": PsoftConfig(
        r=12, use_cayley_neumann=True, num_cayley_neumann_terms=3, cayley_neumann_eps=0.5, psoft_mag_a=False
    ),
    "psoft_linear_series": PsoftConfig(r=12, use_cayley_neumann=True, num_cayley_neumann_terms=2, psoft_mag_b=False),
    "psoft_no_series": PsoftConfig(r=12, use_cayley_neumann=True, num_cayley_neumann_terms=1),
    "psoft_free": PsoftConfig(r=12, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False, init_weights=False),
    "psoft_sketch": PsoftConfig(
        r=12, psoft_svd="lowrank", psoft_svd_lowrank_niter=2, random_seed=7, target_modules=LINEARS
    ),
    "psoft_rank_one": PsoftConfig(r=1, target_modules=LINEARS),
    "tinylora": TinyLoraConfig(r=4, u=8, target_modules=LINEARS, bias="all"),
    "tinylora_drawn_tied": unsaved(
        TinyLoraConfig, r=100, u=3, save_projection=False, projection_seed=7, weight_tying=0.6, target_modules=LINEARS
    ),
    "tinylora_all_tied": TinyLoraConfig(u=20, weight_tying=1.0, layers_to_transform=1, bias="tinylora_only"),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "fourierft": FourierFTConfig(n_frequency=700, scaling=100.0, target_modules=GPT2_LINEARS),
    "fourierft_default_targets": FourierFTConfig(n_frequency=9, scaling=500.0),
    "waveft": WaveFTConfig(n_frequency=500, scaling=1.0, wavelet_family="sym4", target_modules=GPT2_LINEARS),
    "waveft_default_targets": WaveFTConfig(n_frequency=500, scaling=1.0, proportional_parameters=True),
    "vblora": VBLoRAConfig(r=4, num_vectors=30, vector_length=16, target_modules=GPT2_LINEARS),
    "frod": FrodConfig(target_modules=GPT2_LINEARS, progressbar=False),
    "frod_drawn": FrodConfig(target_modules=GPT2_LINEARS, save_projection=False, progressbar=False),
    "unilora": UniLoraConfig(r=4, theta_d_length=100, target_modules=GPT2_LINEARS),
    "tinylora": TinyLoraConfig(r=4, u=8, target_modules=GPT2_LINEARS, bias="all"),
    "shira_head": ShiraConfig(r=4, target_modules=["lm_head"]),
}
