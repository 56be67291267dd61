"""Llama models that transformers saved and LoRA that peft saved, written as GGUF; for ``llama_worker.py``.

Runs in llama.cpp's environment, which has numpy and the package gguf. What cannot be written in full is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from peers.weights import paired, read_safetensors

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
DTYPES = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}
PREFIX, FACTORS = "base_model.model.", {"lora_A": "lora_a", "lora_B": "lora_b"}
EXTENSIONS = ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "alora_invocation_tokens")
"""Options of peft that change what the factors mean; none is written here."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A model's or an adapter's configuration."""
    config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def write_model(folder: Path, out: Path, dtype: str) -> None:
    """Matrices in ``dtype``, vectors in fp32, and no vocabulary: requests are of tokens.

    Raises:
        ValueError: the model is no Llama, or its positions are scaled.
    """
    config = read_config(folder)
    if config["model_type"] != "llama" or config["rope_parameters"]["rope_type"] != "default":
        raise ValueError(f"{folder} is no Llama with plain rotary positions")
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in read_safetensors(path):
            _add(writer, gguf_name(name, config), paired(name, values, config), dtype)
    _write(writer)


def write_adapter(folder: Path, base: dict[str, Any], out: Path) -> None:
    """Both factors of every module, in fp32; ``base`` is the configuration of the model they are for.

    Raises:
        ValueError: it is no plain LoRA.
    """
    config = read_config(folder, "adapter_config.json")
    if config["peft_type"] != "LORA" or any(config.get(option) for option in EXTENSIONS):
        raise ValueError(f"{folder} is no LoRA without extensions")
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    for name, values in read_safetensors(folder / "adapter_model.safetensors"):
        module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in FACTORS:
            raise ValueError(f"{folder} has {name}, which is no factor of a LoRA")
        of_base = f"{module}.weight"
        rows = paired(of_base, values, base) if factor == "lora_B" else values
        _add(writer, f"{gguf_name(of_base, base)}.{FACTORS[factor]}", rows, "float32")
    _write(writer)


def gguf_name(name: str, config: dict[str, Any]) -> str:
    """GGUF's name of a parameter."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"llama.cpp's Llama has no {name}")
    return found


def _add(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], dtype: str) -> None:
    kind = DTYPES[dtype] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
