"""Trainable tokens as peft has them: a few rows of the embedding, and of a tied head, of the adapter's own."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.common import CONFIG_FIELDS, check_task
from weft.adapters.methods.targets import targeted_sites
from weft.adapters.methods.token_rows import take_trained_tokens

FIELDS = CONFIG_FIELDS | FieldTable(
    honoured=("token_indices", "target_modules"),
    ignored={"init_weights": "how the rows were initialised before training"},
)
"""Every field of peft 0.21.2's TrainableTokensConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    config = checkpoint.config
    check_task(config)
    config.check(FIELDS)
    assert base.embedding is not None, "every base has an embedding"
    default = {base.model_type: (base.embedding.path,)}
    tokens = config.integers("token_indices") or ()
    targets = [site.path for site in targeted_sites(config, base, default, embeddings=True)]
    for path in targets:
        if path not in (base.embedding.path, base.head):
            raise AdapterUnsupported(
                f"target_modules selects {path}, which is neither the embedding nor the head", param="target_modules"
            )
    return take_trained_tokens(
        checkpoint, base, dict.fromkeys(targets, tokens), "trainable_tokens_delta", "token_indices"
    )
