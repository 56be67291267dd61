"""Context-aware prompt tuning (arXiv 2410.17222): embeddings in front of the prompt, which peft saves as they are."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SoftPrompt
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS, take_embeddings

FIELDS = PROMPT_FIELDS | FieldTable(
    ignored={
        "cpt_mask": "of the loss during training",
        "cpt_token_ids": "how the prompt was initialised before training",
        "cpt_tokens_type_mask": "which tokens were trained",
        "opt_loss_decay_factor": "of the loss during training",
        "opt_projection_epsilon": "peft projects when it saves",
        "opt_projection_format_epsilon": "peft projects when it saves",
        "opt_weighted_loss_type": "of the loss during training",
        "tokenizer_name_or_path": "of the tokenizer that made cpt_token_ids",
    }
)
"""Every field of peft 0.21.2's CPTConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> SoftPrompt:
    """See ``Method.compile_prompt``."""
    return SoftPrompt(take_embeddings(checkpoint, base, FIELDS, base.hidden_size))
