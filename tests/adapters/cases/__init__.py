"""Configurations of every method: ``all_cases()`` for the tiny Llama, ``all_gpt2_cases()`` for the tiny GPT-2.

Every module of this package has ``CASES`` and ``GPT2_CASES``.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from peft import PeftConfig


def all_cases() -> dict[str, PeftConfig]:
    """Cases for the tiny Llama, whose linears have biases."""
    return _merged("CASES")


def all_gpt2_cases() -> dict[str, PeftConfig]:
    """Cases for the tiny GPT-2, whose linears are Conv1D."""
    return _merged("GPT2_CASES")


def chosen_of(config: PeftConfig) -> dict[str, int]:
    """What the tests' requests choose of such an adapter."""
    return {"task_id": 1} if config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING") else {}


def _merged(name: str) -> dict[str, PeftConfig]:
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    return {case: config for module in modules for case, config in getattr(module, name).items()}
