"""The models and adapters that all systems are given: random ones, saved by transformers and peft, and the demo's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peers.plan import AdapterSet
from weft.server.demo import demo_adapters, demo_model

LLAMA_125M = "768:12:12:2048:32000"
ADAPTER_STD = 0.04
"""Of the factors: enough to change most tokens, while the logits stay of the base's size."""


@dataclass(frozen=True)
class Materials:
    """A model, and adapters by name with their ranks."""

    model: Path
    vocab_size: int
    adapters: dict[str, Path]
    ranks: dict[str, int]


def llama(shape: str) -> LlamaConfig:
    """A Llama of hidden size, layers, heads, width of its MLP and size of its vocabulary, given as "a:b:c:d:e"."""
    hidden, layers, heads, mlp, vocab_size = (int(number) for number in shape.split(":"))
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


class Workshop:
    """Makes each model and each adapter once, in ``folder``; ``shape`` is of the model with random weights."""

    def __init__(self, folder: Path, shape: LlamaConfig) -> None:
        self._folder, self._shape = folder, shape

    def of(self, adapters: AdapterSet) -> Materials:
        """What ``adapters`` names."""
        if adapters.model == "demo":
            return _demo()
        base = self._folder / "base"
        if not base.exists():
            torch.manual_seed(0)
            LlamaForCausalLM(self._shape).to(torch.bfloat16).save_pretrained(base)
            save_tokenizer(base, self._shape.vocab_size)
        names = [f"r{rank}-{index}" for index, rank in enumerate(adapters.ranks)]
        folders = {name: self._folder / name for name in names}
        missing = [i for i, name in enumerate(names) if not folders[name].exists()]
        for rank in sorted({adapters.ranks[i] for i in missing}):
            save_adapters(base, rank, {i: folders[names[i]] for i in missing if adapters.ranks[i] == rank})
        ranks = dict(zip(names, adapters.ranks, strict=True))
        return Materials(base, self._shape.vocab_size, folders, ranks)


def save_tokenizer(base: Path, vocab_size: int) -> None:
    """A byte-level BPE of as many made-up words: the HTTP server turns tokens into text, as it would real ones."""
    words = BPE({f"Ġw{index}": index for index in range(vocab_size)}, [])
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)


def save_adapters(base: Path, rank: int, folders: dict[int, Path]) -> None:
    """LoRA of all linears with random weights, by seed."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for seed, folder in folders.items():
        torch.manual_seed(seed)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=ADAPTER_STD)
        wrapped.save_pretrained(str(folder))


def _demo() -> Materials:
    """The demo's base and those of its adapters that every system serves: LoRA without extensions."""
    configs = {
        name: json.loads((folder / "adapter_config.json").read_text())
        for name, folder in demo_adapters().items()
        if (folder / "adapter_config.json").is_file()
    }
    ranks = {
        name: int(config["r"])
        for name, config in configs.items()
        if config.get("peft_type") == "LORA" and not config["use_dora"]
    }
    vocab_size = int(json.loads((demo_model() / "config.json").read_text())["vocab_size"])
    return Materials(demo_model(), vocab_size, {name: demo_adapters()[name] for name in ranks}, ranks)
