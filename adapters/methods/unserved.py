"""Why the types of peft that are not served are not: the reason a user reads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from weft.adapters.checkpoint import Checkpoint
from weft.adapters.errors import AdapterUnsupported

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "XLORA": "it runs the base twice over every token, first without its experts to find their weights, and needs "
        "keys and values of both runs; its experts are other folders, which the saved one does not contain",
    }
)
"""By peft_type, the end of a sentence."""

CLASSIFIER = "base_model.internal_xlora_classifier.layers.0.weight"
"""The first tensor of X-LoRA's classifier, whatever its depth."""


def check_served(peft_type: str, checkpoint: Checkpoint) -> None:
    """Raise AdapterUnsupported with the reason if the type is known and not served."""
    reason = REASONS.get(peft_type)
    if reason is None:
        return
    if peft_type == "XLORA" and CLASSIFIER not in checkpoint.tensors:
        # Its experts are named 0, 1, ...; when peft 0.21 saves, it drops every tensor whose name has one of them in it.
        reason = f"the file lacks {CLASSIFIER!r}, which peft 0.21 loses when it saves and draws anew when it loads"
    raise AdapterUnsupported(f"{peft_type} is not served: {reason}", param="peft_type")
