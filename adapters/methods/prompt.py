"""Prompt tuning (arXiv 2104.08691): trained embeddings in front of the prompt."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SoftPrompt
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS, take_embeddings

FIELDS = PROMPT_FIELDS | FieldTable(
    ignored={
        "prompt_tuning_init": "how the prompt was initialised before training",
        "prompt_tuning_init_text": "how the prompt was initialised before training",
        "tokenizer_kwargs": "of the tokenizer of prompt_tuning_init_text",
        "tokenizer_name_or_path": "of the tokenizer of prompt_tuning_init_text",
    }
)
"""Every field of peft 0.21.2's PromptTuningConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> SoftPrompt:
    """See ``Method.compile_prompt``."""
    return SoftPrompt(take_embeddings(checkpoint, base, FIELDS, base.hidden_size))
