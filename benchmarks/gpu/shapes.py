"""Sizes of the models that are measured, and what their steps must read: pure arithmetic.

The limit of a memory-bound decode step, with W the bytes of the base's weights that are read, KV those of the rows'
keys and values, a(r) = 2 r sum(d_in + d_out) those of an adapter of rank r on every linear, BW the bandwidth:

    T_base = (W + KV) / BW      T = T_base + sum over the batch's adapters of a(r) / BW      R_ideal = T_base / T
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIXED = (8, 16, 64)
"""Ranks of a mixed set of adapters, in turn."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder of Llama's or Qwen 3's make.

    Attributes:
        itemsize: bytes of a number.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    itemsize: int = 2

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of the linears of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def weight_bytes(self) -> int:
        """W: every layer's matrices and the head. Of the embedding only a row for each token is read."""
        layer = sum(width_in * width_out for width_in, width_out in self.linears.values())
        return self.itemsize * (self.layers * layer + self.vocab * self.hidden)

    def adapter_bytes(self, rank: int) -> int:
        """a(r): both factors at every linear."""
        widths = sum(width_in + width_out for width_in, width_out in self.linears.values())
        return self.itemsize * rank * self.layers * widths

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return self.itemsize * 2 * self.layers * self.kv_heads * self.head_dim * tokens

    def config(self) -> dict[str, Any]:
        """Of transformers' configuration of this model type."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
        }


SHAPES: Mapping[str, Shape] = {
    "llama-3-8b": Shape("Llama-3-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "qwen3-4b": Shape("Qwen3-4B", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "tiny": Shape("tiny", "llama", 2, 64, 96, 4, 2, 16, 128, False, 4),
}


def ranks_of(count: int, rank: int | None) -> list[int]:
    """The ranks of so many adapters; ``rank`` None: mixed."""
    return [rank or MIXED[index % len(MIXED)] for index in range(count)]


def spread(batch: int, adapters: int) -> list[int]:
    """The slot of each row, as evenly as can be; -1 without adapters."""
    return [row % adapters if adapters else -1 for row in range(batch)]


def ideal_ratio(shape: Shape, batch: int, context: int, ranks: Sequence[int]) -> float:
    """R_ideal of a step of ``batch`` rows with ``context`` tokens each, in which adapters of these ranks take part."""
    base = shape.weight_bytes + shape.kv_bytes(batch * context)
    return base / (base + sum(map(shape.adapter_bytes, ranks)))


def site_bytes(width_in: int, width_out: int, slots: Sequence[int], ranks: Sequence[int], itemsize: int = 2) -> int:
    """What one linear's update must move: the factors of the batch's slots at their true rank, x once, y twice.

    Args:
        slots: of each row, -1 for the base. ranks: of each slot.
    """
    active = {slot for slot in slots if slot >= 0}
    adapted = sum(slot >= 0 for slot in slots)
    weights = sum(ranks[slot] for slot in active) * (width_in + width_out)
    return itemsize * (weights + adapted * (width_in + 2 * width_out))
