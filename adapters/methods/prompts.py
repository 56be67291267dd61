"""Trained prompts: prefix tuning (arXiv 2101.00190), P-Tuning v2 (2110.07602) and Cartridges (2506.06266) put keys and
values in front, in every layer; prompt tuning (2104.08691), P-Tuning v1 (2103.10385) and context-aware prompts
(2410.17222) put embeddings there.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import PrefixKV, SoftPrompt
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS, take_embeddings

_ENCODER = "of the encoder, which peft applies when it saves"
_START = "how the prompt was initialised before training"
_LOSS = "of the loss during training"

KEYS_AND_VALUES: Mapping[str, FieldTable] = {
    "PREFIX_TUNING": FieldTable(
        ignored={"encoder_hidden_size": _ENCODER, "prefix_projection": _ENCODER, "init_weights": _START}
    ),
    "CARTRIDGE": FieldTable(ignored={"num_frozen_tokens": "which tokens were not trained"}),
}

EMBEDDINGS: Mapping[str, FieldTable] = {
    "PROMPT_TUNING": FieldTable(
        ignored={
            "prompt_tuning_init": _START,
            "prompt_tuning_init_text": _START,
            "tokenizer_kwargs": "of the tokenizer of prompt_tuning_init_text",
            "tokenizer_name_or_path": "of the tokenizer of prompt_tuning_init_text",
        }
    ),
    "P_TUNING": FieldTable(
        ignored={
            "encoder_dropout": _ENCODER,
            "encoder_hidden_size": _ENCODER,
            "encoder_num_layers": _ENCODER,
            "encoder_reparameterization_type": _ENCODER,
        }
    ),
    "CPT": FieldTable(
        ignored={
            "cpt_mask": _LOSS,
            "cpt_token_ids": _START,
            "cpt_tokens_type_mask": "which tokens were trained",
            "opt_loss_decay_factor": _LOSS,
            "opt_projection_epsilon": "peft projects when it saves",
            "opt_projection_format_epsilon": "peft projects when it saves",
            "opt_weighted_loss_type": _LOSS,
            "tokenizer_name_or_path": "of the tokenizer that made cpt_token_ids",
        }
    ),
}

FIELDS: Mapping[str, FieldTable] = {
    peft_type: PROMPT_FIELDS | fields for peft_type, fields in (*KEYS_AND_VALUES.items(), *EMBEDDINGS.items())
}
"""Every field of peft 0.21.2's configs, by ``peft_type``."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> PrefixKV | SoftPrompt:
    """See ``Method.compile_prompt``. Rows of keys and values hold key, value, key, value, ... of all layers; keys were
    never rotated, and real tokens start at position n."""
    peft_type = checkpoint.config.text("peft_type")
    assert peft_type is not None, "the caller chose this module by it"
    if peft_type in EMBEDDINGS:
        return SoftPrompt(take_embeddings(checkpoint, FIELDS[peft_type], base.hidden_size))
    layers, heads, width = base.num_layers, base.kv_heads, base.head_dim
    rows = take_embeddings(checkpoint, FIELDS[peft_type], 2 * layers * heads * width)
    tensors = rows.view(len(rows), 2 * layers, heads, width).unbind(1)
    return PrefixKV(tensors[0::2], tensors[1::2], position_offset=len(rows))
