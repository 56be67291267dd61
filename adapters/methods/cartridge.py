"""Cartridges (arXiv 2506.06266): a trained prefix of keys and values, as prefix tuning has it."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import PrefixKV
from weft.adapters.methods.prefix import prefix_of
from weft.adapters.methods.prompt_fields import PROMPT_FIELDS

FIELDS = PROMPT_FIELDS | FieldTable(ignored={"num_frozen_tokens": "which tokens were not trained"})
"""Every field of peft 0.21.2's CartridgeConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> PrefixKV:
    """See ``Method.compile_prompt``."""
    return prefix_of(checkpoint, base, FIELDS)
