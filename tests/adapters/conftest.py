"""Base models shared by the tests of the adapters: built once, never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.models import load_model, tiny_model
from weft.adapters.base import Base


@dataclass(frozen=True)
class TinyBase:
    """A base model on disk, in memory, and as the loaders see it."""

    folder: Path
    model: PreTrainedModel
    base: Base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBase]:
    """``tiny_base("llama")``."""

    @cache
    def build(arch: str) -> TinyBase:
        folder = tiny_model(arch, tmp_path_factory.mktemp(arch))
        model = load_model(folder, eager=True)
        return TinyBase(folder, model, Base.of(model))

    return build


@pytest.fixture
def llama(tiny_base: Callable[[str], TinyBase]) -> TinyBase:
    return tiny_base("llama")
