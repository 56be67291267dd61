"""Train the demo from nothing: the tokenizer, the base model, one LoRA adapter per task.

    python -m weft.server.demo.train                 everything
    python -m weft.server.demo.train --only sql      one adapter again, on the base model as it is

Every text is generated from a fixed seed and every operation is deterministic, so a second run on
the same machine with the same versions of the libraries writes the same weights. The training uses
bfloat16 autocast, which is fast on processors with AMX and correct on all others. On a 2-core Xeon
with AMX the base takes 15 minutes, and 500 steps of an adapter 3.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft.server.demo import adapter_path, demo_model
from weft.server.demo.batches import Batch, document_text, example_batches, packed_batches
from weft.server.demo.tasks import TASKS, Task
from weft.server.demo.tasks.corpus import corpus
from weft.server.demo.tokenizer import train_tokenizer

BASE_THREADS = 2
ADAPTER_THREADS = 1
"""Sums depend on the number of threads, so it belongs to the recipe."""
SEED = 20
TOKENIZER_DOCUMENTS = 20_000

WARMUP_STEPS = 50

BASE_NAME = "weft-demo"
BASE_STEPS = 1600
BASE_ROWS = 32
BASE_LENGTH = 128
BASE_RATE = 2e-3
BASE_DECAY = 0.1
FAST_ROTATIONS = 8

ADAPTER_STEPS = {
    "sql": 1400,
    "extract": 1400,
    "data2text": 1400,
    "formal": 700,
    "translate": 700,
    "classify": 500,
    "arithmetic": 400,
}
"""Tasks that copy names and amounts from the prompt take the longest."""
ADAPTER_ROWS = 16
ADAPTER_RATES = {
    "sql": 1e-3,
    "extract": 1e-3,
    "data2text": 1e-3,
    "formal": 3e-3,
    "translate": 3e-3,
    "classify": 1e-3,
    "arithmetic": 3e-3,
}
RANK = 16
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate at a step: a short warm-up, a plateau, a linear way down over the last quarter."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 4 * (1 - step / steps))


def fit(model: torch.nn.Module, batches: Iterator[Batch], steps: int, rate: float, decay: float, label: str) -> None:
    """Train the parameters of `model` that require a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(islice(batches, steps), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch._asdict()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(f"{label}: step {step}/{steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on a part of the corpus."""
    # The rendering of a dialogue needs a template, not merges: an untrained tokenizer has it.
    renderer = train_tokenizer([])
    documents = islice(corpus(Random(f"{SEED}/tokenizer")), TOKENIZER_DOCUMENTS)
    return train_tokenizer(document_text(renderer, document) for document in documents)


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the base model: 3.5 million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_base(folder: Path) -> None:
    """Pretrain the base model and save it, rounded to bfloat16, with its tokenizer."""
    torch.set_num_threads(BASE_THREADS)
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    config = base_config(tokenizer)
    model = LlamaForCausalLM(config)
    batches = packed_batches(tokenizer, Random(f"{SEED}/base"), BASE_ROWS, BASE_LENGTH)
    fit(model, batches, BASE_STEPS, BASE_RATE, BASE_DECAY, "base")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def train_adapter(task: Task, base: Path, folder: Path) -> None:
    """Train one LoRA adapter on the saved base model and save it in bfloat16."""
    torch.set_num_threads(ADAPTER_THREADS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # The adapter must fit the base as it is served: the rounded weights, not those of the training.
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    batches = example_batches(tokenizer, task, ADAPTER_ROWS)
    fit(adapted, batches, ADAPTER_STEPS[task.id], ADAPTER_RATES[task.id], 0.0, task.id)
    shutil.rmtree(folder, ignore_errors=True)
    adapted.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    tidy_adapter(folder)


def tidy_adapter(folder: Path) -> None:
    """Take the training machine's traces out of a saved adapter, so that every run writes the same files."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train the demo's base model and adapters.")
    parser.add_argument("--only", choices=[*TASKS, "base"], help="train only this adapter, or only the base model")
    only = parser.parse_args().only
    torch.use_deterministic_algorithms(True)
    if only in (None, "base"):
        train_base(demo_model())
    for task in TASKS.values():
        if only in (None, task.id):
            train_adapter(task, demo_model(), adapter_path(task.id))


if __name__ == "__main__":
    main()
