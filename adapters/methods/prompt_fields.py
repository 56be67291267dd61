"""What peft's methods that put something in front of the prompt share: their fields, and the tensor they save."""

from __future__ import annotations

import torch

from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.methods.common import COMMON_FIELDS, check_task

MAX_VIRTUAL_TOKENS = 1 << 16

PROMPT_FIELDS = COMMON_FIELDS | FieldTable(
    honoured=("num_virtual_tokens", "num_transformer_submodules"),
    ignored={
        "num_attention_heads": "the base has them, and the saved tensor must fit it",
        "num_layers": "the base has them, and the saved tensor must fit it",
        "token_dim": "the base has it, and the saved tensor must fit it",
    },
)


def take_embeddings(checkpoint: Checkpoint, fields: FieldTable, width: int) -> torch.Tensor:
    """The saved ``prompt_embeddings``, fp32 ``[num_virtual_tokens, width]``, once all fields were checked.

    peft runs whatever makes the prompt (an MLP, an LSTM, a projection) when it saves, and keeps the result alone.
    """
    config = checkpoint.config
    check_task(config)
    config.check(fields)
    if config.value("num_transformer_submodules", 1) != 1:
        raise AdapterUnsupported(
            "num_transformer_submodules must be 1: a causal model has no second half",
            param="num_transformer_submodules",
        )
    tokens = config.integer("num_virtual_tokens", 0, low=1, high=MAX_VIRTUAL_TOKENS)
    return checkpoint.tensors.take("prompt_embeddings", (tokens, width)).float()
