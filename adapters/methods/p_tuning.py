"""P-Tuning v1 (arXiv 2103.10385) as peft has it: embeddings in front of the prompt, made by an MLP or LSTM."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SoftPrompt
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS, take_embeddings

FIELDS = PROMPT_FIELDS | FieldTable(
    ignored={
        "encoder_dropout": "of the encoder, which peft applies when it saves",
        "encoder_hidden_size": "of the encoder, which peft applies when it saves",
        "encoder_num_layers": "of the encoder, which peft applies when it saves",
        "encoder_reparameterization_type": "of the encoder, which peft applies when it saves",
    }
)
"""Every field of peft 0.21.2's PromptEncoderConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> SoftPrompt:
    """See ``Method.compile_prompt``."""
    return SoftPrompt(take_embeddings(checkpoint, base, FIELDS, base.hidden_size))
