"""Train the demo from nothing: the tokenizer, the base model, one LoRA adapter per task.

    python -m weft.server.demo.train                 everything
    python -m weft.server.demo.train --only sql      one adapter again, on the base model as it is

Every text is generated from a fixed seed and every operation is deterministic, so a second run on
the same machine with the same versions of the libraries writes the same weights. The training uses
bfloat16 autocast, which is fast on processors with AMX and correct on all others. On a 2-core Xeon
with AMX the base takes 28 minutes, and two adapters at a time 4 to 7.
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
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weft.server.demo import adapter_path, demo_model
from weft.server.demo.batches import Batch, document_text, example_batches, packed_batches, recall_batches
from weft.server.demo.tasks import TASKS, Task
from weft.server.demo.tasks.corpus import corpus
from weft.server.demo.tokenizer import train_tokenizer

BASE_THREADS = 2
ADAPTER_THREADS = 1
"""Sums depend on the number of threads, so it belongs to the recipe."""
SEED = 20
TOKENIZER_DOCUMENTS = 20_000

WARMUP_STEPS = 50
ATTENTION = "eager"
"""On short rows the CPU's fused attention is slower, backward above all."""

BASE_NAME = "weft-demo"
RECALL_STEPS = {16: 300, 32: 100, 64: 100}
"""Steps on rows of nothing but repeated names, by the length of a row.

The base learns to copy before it learns a language. In short rows there is little else to look at, so
it takes a few hundred steps; on the texts alone it did not copy after 1600.
"""
RECALL_ROWS = 4
"""Of such rows in every later batch."""
BASE_STEPS = 5500
BASE_TOKENS = 2048
BASE_LENGTH = 128
BASE_RATE = 1e-3
BASE_DECAY = 0.1
HEADS, KV_HEADS = 4, 2
ROTARY_BASE = 1000.0
LOOK_BACK = 4.0
"""Size of the biases that ``look_back`` sets."""

ADAPTER_STEPS = {
    "sql": 700,
    "extract": 700,
    "data2text": 700,
    "formal": 700,
    "translate": 700,
    "classify": 500,
    "arithmetic": 400,
}
ADAPTER_ROWS = 16
ADAPTER_RATE = 1e-3
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


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The shape of the base model: 3.5 million parameters."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def base_batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """The base's curriculum: repeated names in rows that get longer, then mostly the corpus."""
    rng = Random(f"{SEED}/base")
    for length, steps in RECALL_STEPS.items():
        yield from islice(recall_batches(tokenizer, rng, BASE_TOKENS // length, length), steps)
    rows = BASE_TOKENS // BASE_LENGTH
    # Without some of what it learned first in every batch, the base forgets how to copy within a hundred steps.
    copied = recall_batches(tokenizer, rng, RECALL_ROWS, BASE_LENGTH)
    read = packed_batches(tokenizer, corpus(rng), rows - RECALL_ROWS, BASE_LENGTH)
    for batches in zip(copied, read, strict=True):
        yield Batch(*map(torch.cat, zip(*batches, strict=True)))


def look_back(model: Qwen2ForCausalLM) -> None:
    """Start the first layer with two heads that look at the token before, whatever it is.

    Copying needs such a head, and a model of this size takes long to find one. The biases of query and
    key alone make it: rotated to their positions, they agree where the key stands one place before.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    width = config.hidden_size // config.num_attention_heads
    heads = HEADS // KV_HEADS
    angles = ROTARY_BASE ** (-torch.arange(width // 2) / (width // 2))
    here = torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])
    before = torch.cat([angles.cos(), angles.sin()])
    with torch.no_grad():
        attention.q_proj.bias[: heads * width] = LOOK_BACK * here.repeat(heads)
        attention.k_proj.bias[:width] = LOOK_BACK * before


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same model under Llama's name: its attention's output has a bias too, which is zero.

    transformers gives whatever is called Qwen the pre-tokenizer of the real Qwen, in place of the saved one.
    """
    config = model.config
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            **heads,
            **tokens,
            num_hidden_layers=config.num_hidden_layers,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            tie_word_embeddings=True,
            attention_bias=True,
        )
    )
    weights = llama.state_dict()
    biases = {name: torch.zeros_like(bias) for name, bias in weights.items() if name.endswith("o_proj.bias")}
    llama.load_state_dict(model.state_dict() | biases)
    llama.generation_config = GenerationConfig(**tokens)
    return llama


def train_base(folder: Path) -> None:
    """Pretrain the base model and save it, rounded to bfloat16, with its tokenizer."""
    torch.set_num_threads(BASE_THREADS)
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    config = base_config(tokenizer)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    look_back(model)
    fit(model, base_batches(tokenizer), BASE_STEPS, BASE_RATE, BASE_DECAY, "base")
    shutil.rmtree(folder, ignore_errors=True)
    as_llama(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def train_adapter(task: Task, base: Path, folder: Path) -> None:
    """Train one LoRA adapter on the saved base model and save it in bfloat16."""
    torch.set_num_threads(ADAPTER_THREADS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # The adapter must fit the base as it is served: the rounded weights, not those of the training.
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=ATTENTION)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    batches = example_batches(tokenizer, task, ADAPTER_ROWS)
    fit(adapted, batches, ADAPTER_STEPS[task.id], ADAPTER_RATE, 0.0, task.id)
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
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if only in (None, "base"):
        train_base(demo_model())
    for task in TASKS.values():
        if only in (None, task.id):
            train_adapter(task, demo_model(), adapter_path(task.id))


if __name__ == "__main__":
    main()
