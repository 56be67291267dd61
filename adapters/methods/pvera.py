"""PVeRA (arXiv 2512.07703) as peft has it: VeRA whose A and λd make a mean and a variance; inference takes the mean."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, Neutral
from weft.adapters.forms import SiteForms
from weft.adapters.methods import vera

FIELDS = vera.SHARED_FIELDS | FieldTable(
    ignored={
        "generator_seed": "only read to sample, which is refused",
        "pvera_dropout": "no dropout at inference",
    },
    neutral={"sample_at_inference": Neutral("every token would draw its own adapter")},
)
"""Every field of peft 0.21.2's PveraConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    return vera.compile_shared(checkpoint, base, FIELDS, "pvera", parts=2)
