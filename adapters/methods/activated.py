"""Activated LoRA (arXiv 2504.12397): a LoRA that works from the last occurrence of its invocation in the prompt on."""

from __future__ import annotations

from collections.abc import Sequence

from weft.adapters.base import Base, Site
from weft.adapters.config_fields import ConfigFields, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported

MAX_INVOCATION = 256
"""Tokens: every prompt is searched for them."""

OTHER_VARIANTS = ("use_dora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
"""Fields of peft's other variants of LoRA, none of which it combines with this one."""


def invocation_tokens(config: ConfigFields, sites: Sequence[Site], base: Base) -> tuple[int, ...]:
    """``alora_invocation_tokens``; empty for a LoRA that works from the first token on, as in peft.

    Raises:
        AdapterUnsupported: with something that peft has on at every token, or does not have for activated LoRA.
        AdapterFormatError, AdapterMismatch: they are not tokens of the base.
    """
    tokens = config.integers("alora_invocation_tokens")
    if not tokens:
        return ()
    if len(tokens) > MAX_INVOCATION:
        raise AdapterFormatError(
            f"alora_invocation_tokens has {len(tokens)} tokens; the limit is {MAX_INVOCATION}",
            param="alora_invocation_tokens",
        )
    assert base.embedding is not None, "every base has an embedding"
    wrong = next((token for token in tokens if not 0 <= token < base.embedding.in_features), None)
    if wrong is not None:
        raise AdapterMismatch(
            f"alora_invocation_tokens has {show(wrong)}, outside the vocabulary of {base.embedding.in_features}",
            param="alora_invocation_tokens",
        )
    others = [name for name in OTHER_VARIANTS if config.value(name, None)]
    others += ["init_lora_weights='mica'"] if config.value("init_lora_weights", True) == "mica" else []
    others += ["an adapted embedding"] if base.embedding in sites else []
    if others:
        raise AdapterUnsupported(
            f"alora_invocation_tokens with {others[0]} is not defined, nor does peft make it",
            param="alora_invocation_tokens",
        )
    always = [name for name in ("modules_to_save", "trainable_token_indices") if config.value(name, None)]
    always += ["bias"] if config.value("bias", "none") != "none" else []
    if always:
        raise AdapterUnsupported(
            f"{always[0]} is not served with alora_invocation_tokens: it would change the tokens before the invocation",
            param=always[0],
        )
    return tokens
