"""What weft knows of peft's configurations: every field of every served method, and the default targets."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import constants
from peft.utils.peft_types import PeftType

from weft.adapters.config_fields import FieldTable
from weft.adapters.methods import METHODS, PROMPT_METHODS, defaults

MODULES = {**METHODS, **PROMPT_METHODS}


@pytest.mark.parametrize("peft_type", MODULES)
def test_every_field_of_pefts_config_is_classified_once(peft_type: str) -> None:
    """Fails when peft grows a field: find out what it does before it is put into the table."""
    found = import_module(f"weft.adapters.methods.{MODULES[peft_type]}").FIELDS
    fields: FieldTable = found if isinstance(found, FieldTable) else found[peft_type]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    assert fields.names - {"runtime_config"} == {field.name for field in dataclasses.fields(config)} - {
        "runtime_config"
    }
    assert len(fields.names) == len(set(fields.honoured)) + len(fields.ignored) + len(fields.neutral)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("LORA", "LORA"),
        ("NARROW_PHI", "VERA"),
        ("NARROW_PHI", "SHIRA"),
        ("NARROW_PHI", "PVERA"),
        ("LORA", "LOHA"),
        ("LORA", "LOKR"),
        ("LORA", "HRA"),
        ("LORA", "MISS"),
        ("LORA", "DELORA"),
        ("LORA", "GRALORA"),
        ("LORA", "RANDLORA"),
        ("LORA", "HIRA"),
        ("LORA", "DEFT"),
        ("SPECTRAL", "FOURIERFT"),
        ("SPECTRAL", "C3A"),
        ("ADALORA", "ADALORA"),
        ("ADALORA", "VBLORA"),
        ("IA3", "IA3"),
        ("BEFT", "BEFT"),
        ("SPECTRAL", "WAVEFT"),
        ("LORA", "GLORA"),
        ("LORA", "SUPERTUNING"),
        ("LORA", "UNILORA"),
        ("LORA", "PSOFT"),
        ("LORA", "OFT"),
        ("LORA", "BOFT"),
        ("LORA", "ROAD"),
        ("LORA", "TINYLORA"),
        ("LORA", "LILY"),
        ("NARROW_PHI", "FROD"),
        ("OSF", "OSF"),
        ("LN_TUNING", "LNTUNING"),
    ],
)
def test_default_targets_are_pefts(ours: str, theirs: str) -> None:
    peft_targets = getattr(constants, f"TRANSFORMERS_MODELS_TO_{theirs}_TARGET_MODULES_MAPPING")
    for model_type, targets in getattr(defaults, ours).items():
        assert list(targets) == peft_targets[model_type], model_type


def test_feedforward_modules_are_pefts() -> None:
    peft_targets = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {name: list(targets) for name, targets in defaults.IA3_FEEDFORWARD.items()}.items() <= peft_targets.items()
