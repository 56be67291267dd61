"""Methods that rotate inputs or turn outputs: OFT, BOFT, RoAd."""

from __future__ import annotations

from peft import BOFTConfig, OFTConfig, PeftConfig, RoadConfig

from tests.adapters.cases.basic import LINEARS

CASES: dict[str, PeftConfig] = {
    "oft": OFTConfig(oft_block_size=8, target_modules=LINEARS),
    "oft_default_targets": OFTConfig(init_weights=False),
    "oft_adjusted_size": OFTConfig(oft_block_size=9, target_modules=LINEARS, init_weights=False),
    "oft_whole_width": OFTConfig(oft_block_size=500, target_modules=["q_proj", "down_proj"]),
    "oft_count": OFTConfig(r=4, oft_block_size=0, target_modules=LINEARS),
    "oft_adjusted_count": OFTConfig(r=7, oft_block_size=0, target_modules=LINEARS),
    "oft_exact": OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=LINEARS, init_weights=False),
    "oft_two_terms": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, target_modules=LINEARS),
    "oft_three_terms": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=LINEARS),
    "oft_seven_terms": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=7, target_modules=LINEARS),
    "oft_coft": OFTConfig(oft_block_size=8, coft=True, eps=0.7, target_modules=LINEARS, init_weights=False),
    "oft_shared": OFTConfig(oft_block_size=8, block_share=True, target_modules=LINEARS, init_weights=False),
    "oft_shared_coft": OFTConfig(
        oft_block_size=4, block_share=True, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=LINEARS
    ),
    "oft_layers": OFTConfig(
        oft_block_size=16, target_modules=LINEARS, layers_to_transform=[0, 2], init_weights=False, bias="oft_only"
    ),
    "oft_saved": OFTConfig(oft_block_size=8, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
    "oft_embedding": OFTConfig(oft_block_size=12, target_modules=["q_proj", "embed_tokens"], init_weights=False),
    "boft": BOFTConfig(target_modules=LINEARS),
    "boft_default_targets": BOFTConfig(boft_block_size=8, init_weights=False),
    "boft_count": BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=LINEARS, init_weights=False),
    "boft_bias": BOFTConfig(boft_block_size=8, target_modules=["q_proj", "down_proj"], bias="all", init_weights=False),
    "boft_factors_of_the_config_alone": BOFTConfig(boft_n_butterfly_factor=2, target_modules=LINEARS),
    "boft_saved": BOFTConfig(target_modules=["o_proj"], modules_to_save=["lm_head"], exclude_modules=["layers.1"]),
    "road_1": RoadConfig(group_size=8, target_modules=LINEARS),
    "road_2": RoadConfig(variant="road_2", group_size=4, target_modules=LINEARS),
    "road_4": RoadConfig(variant="road_4", group_size=2, target_modules=LINEARS),
    "road_4_wide": RoadConfig(variant="road_4", group_size=88, target_modules=["gate_proj"], init_weights=False),
    "road_default_targets": RoadConfig(group_size=40, init_weights=False),
    "road_saved": RoadConfig(group_size=8, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]),
}

GPT2_CASES: dict[str, PeftConfig] = {
    "oft_embedding": OFTConfig(oft_block_size=12, target_modules=["wte"], init_weights=False),
}
