"""Trains the demo's base model and its tokenizer from nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weft.server.demo.batches import Batch, document_text, packed_batches, recall_batches
from weft.server.demo.fit import ATTENTION, SEED, fit
from weft.server.demo.tasks.corpus import corpus
from weft.server.demo.tokenizer import train_tokenizer

THREADS = 2
"""Sums depend on the number of threads, so it belongs to the recipe."""
TOKENIZER_DOCUMENTS = 20_000

RECALL_STEPS = {16: 300, 32: 100, 64: 100}
"""Steps on rows of nothing but repeated names, by the length of a row.

The base learns to copy before it learns a language. In short rows there is little else to look at, so
it takes a few hundred steps; on the texts alone it did not copy after 1600.
"""
RECALL_ROWS = 4
"""Of such rows in every later batch."""
STEPS = 5500
TOKENS = 2048
LENGTH = 128
RATE = 1e-3
DECAY = 0.1
HEADS, KV_HEADS = 4, 2
ROTARY_BASE = 1000.0
LOOK_BACK = 4.0
"""Size of the biases that ``look_back`` sets."""


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
        yield from islice(recall_batches(tokenizer, rng, TOKENS // length, length), steps)
    rows = TOKENS // LENGTH
    # Without some of what it learned first in every batch, the base forgets how to copy within a hundred steps.
    copied = recall_batches(tokenizer, rng, RECALL_ROWS, LENGTH)
    read = packed_batches(tokenizer, corpus(rng), rows - RECALL_ROWS, LENGTH)
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
    torch.set_num_threads(THREADS)
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    config = base_config(tokenizer)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    look_back(model)
    fit(model, base_batches(tokenizer), STEPS, RATE, DECAY, "base")
    shutil.rmtree(folder, ignore_errors=True)
    as_llama(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
