"""LLaMA-Adapter. Its cases for Llama and Mistral are in ``test_adaption_prompt``: peft cannot run it on the tiny Llama,
whose heads do not make up the hidden size."""

from __future__ import annotations

from peft import AdaptionPromptConfig, PeftConfig

CASES: dict[str, PeftConfig] = {}

GPT2_CASES: dict[str, PeftConfig] = {
    "adaption_prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=2),
    "adaption_prompt_named": AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=40, adapter_layers=3, target_modules="attn"
    ),
}
