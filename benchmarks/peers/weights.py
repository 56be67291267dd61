"""Saved weights as llama.cpp's Llama has them, before they are written as GGUF (``gguf_files.py``); numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_safetensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor in fp32. Read by hand, for numpy has no bf16 and this environment no torch."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = content[start + first : start + last]
        if entry["dtype"] == "BF16":  # the upper half of fp32
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            values = np.frombuffer(raw, "<f4")
        else:
            raise ValueError(f"{path}: {name} is of {entry['dtype']}")
        yield name, values.reshape(entry["shape"])


def paired(name: str, values: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The rows (out, ...) of queries and keys in llama.cpp's order, others as they are.

    transformers turns elements i and i + head_dim / 2 of a head together, llama.cpp's Llama neighbours 2i and 2i + 1.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return values
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
