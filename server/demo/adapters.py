"""Trains the demo's adapters: a LoRA for each task, and one adapter of each other kind for some of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdaLoraModel,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from weft.server.demo import ADAPTERS, adapter_path
from weft.server.demo.batches import example_batches
from weft.server.demo.bottleneck import BottleneckConfig, BottleneckModel
from weft.server.demo.fit import ATTENTION, SEED, fit
from weft.server.demo.tasks import TASKS

THREADS = 1
"""Sums depend on the number of threads, so it belongs to the recipe."""
ROWS = 16
BASE_NAME = "weft-demo"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained.

    Attributes:
        config: of peft, or of a bottleneck, which peft does not have.
        steps: of training.
        rate: the peak learning rate.
    """

    config: PeftConfig | BottleneckConfig
    steps: int
    rate: float = 1e-3


def recipe(adapter: str) -> Recipe:
    """How the adapter of this id is trained."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": BASE_NAME}
    linear: dict[str, Any] = {**common, "target_modules": LINEAR_LAYERS}
    match ADAPTERS[adapter].method:
        case "LoRA":
            steps = {"classify": 500, "arithmetic": 400}.get(adapter, 700)
            return Recipe(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, **linear), steps)
        case "DoRA":
            return Recipe(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, use_dora=True, **linear), 700)
        case "AdaLoRA":
            schedule: dict[str, Any] = {"tinit": 100, "tfinal": 500, "deltaT": 10, "total_step": 1000}
            return Recipe(AdaLoraConfig(init_r=16, target_r=10, lora_alpha=32, **schedule, **linear), 1000, 2e-3)
        case "IA3":
            return Recipe(IA3Config(feedforward_modules=["down_proj"], **linear), 500, 1e-2)
        case "prefix tuning":
            projection: dict[str, Any] = {"prefix_projection": True, "encoder_hidden_size": 256}
            return Recipe(PrefixTuningConfig(num_virtual_tokens=16, **projection, **common), 1000)
        case "prompt tuning":
            # Vectors of tokens are a far better start than noise of unit variance.
            start: dict[str, Any] = {"prompt_tuning_init": "SAMPLE_VOCAB", "tokenizer_name_or_path": BASE_NAME}
            return Recipe(PromptTuningConfig(num_virtual_tokens=20, **start, **common), 2000, 1e-2)
        case "P-tuning":
            return Recipe(PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=256, **common), 2000)
        case "bottleneck":
            return Recipe(BottleneckConfig(reduction_factor=4), 1500, 3e-3)
    raise AssertionError(f"{adapter} has no recipe")


def train_adapter(adapter: str, base: Path) -> None:
    """Train one adapter on the saved base model and save it in bfloat16."""
    torch.set_num_threads(THREADS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # The adapter must fit the base as it is served: the rounded weights, not those of the training.
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=ATTENTION)
    torch.manual_seed(SEED)
    how = recipe(adapter)
    adapted: PeftModel | BottleneckModel
    if isinstance(how.config, PeftConfig):
        adapted = get_peft_model(model, how.config)
    else:
        adapted = BottleneckModel(model, how.config.reduction_factor)
    batches = example_batches(tokenizer, TASKS[ADAPTERS[adapter].task], ROWS)
    fit(adapted, batches, how.steps, how.rate, 0.0, adapter, _after_step(adapted))
    folder = adapter_path(adapter)
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(adapted, BottleneckModel):
        adapted.save(folder, adapter)
        return
    adapted.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    tidy_adapter(folder)


def _after_step(adapted: PeftModel | BottleneckModel) -> Callable[[int], None]:
    """AdaLoRA counts how much each of its ranks matters, and gives up those that do not."""
    if isinstance(adapted, PeftModel) and isinstance(adapted.base_model, AdaLoraModel):
        return adapted.base_model.update_and_allocate
    return lambda step: None


def tidy_adapter(folder: Path) -> None:
    """Take the training machine's traces out of a saved adapter, so that every run writes the same files."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    for name in ("target_modules", "feedforward_modules"):
        if name in config:
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
