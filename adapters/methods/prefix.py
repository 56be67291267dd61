"""Prefix tuning (arXiv 2101.00190) and P-Tuning v2 (2110.07602): trained keys and values in front, in every layer."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import PrefixKV
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS, take_embeddings

FIELDS = PROMPT_FIELDS | FieldTable(
    ignored={
        "encoder_hidden_size": "of the projection, which peft applies when it saves",
        "init_weights": "how the prefix was initialised before training",
        "prefix_projection": "peft applies it when it saves",
    }
)
"""Every field of peft 0.21.2's PrefixTuningConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> PrefixKV:
    """See ``Method.compile_prompt``."""
    return prefix_of(checkpoint, base, FIELDS)


def prefix_of(checkpoint: Checkpoint, base: Base, fields: FieldTable) -> PrefixKV:
    """The saved rows hold key, value, key, value, ... of all layers; keys were never rotated, and real tokens start at
    position n."""
    layers, heads, width = base.num_layers, base.kv_heads, base.head_dim
    rows = take_embeddings(checkpoint, base, fields, 2 * layers * heads * width)
    tensors = rows.view(len(rows), 2 * layers, heads, width).unbind(1)
    return PrefixKV(tensors[0::2], tensors[1::2], position_offset=len(rows))
