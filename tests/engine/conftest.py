"""One tiny base with LoRA adapters of every kind, shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Driver, Oracles
from tests.engine.variants import lora_variants
from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine


@dataclass(frozen=True)
class Zoo:
    """A base, its adapters by name, peft's answers, and what requests choose of an adapter."""

    base: Path
    adapters: dict[str, Path]
    oracles: Oracles
    choices: dict[str, dict[str, int]] = field(default_factory=dict)

    def engine(self, **settings: Any) -> Engine:
        """An engine with all adapters registered under their names as versions."""
        engine = Engine(EngineConfig(str(self.base), **{"dtype": "float32", "max_adapters": 16, **settings}))
        for name, folder in self.adapters.items():
            engine.register_adapter(name, folder)
        return engine

    def driver(self, **settings: Any) -> Driver:
        return Driver(self.engine(**settings))


@pytest.fixture(scope="session")
def zoo_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    """``zoo_of("gemma2")``: a base of that architecture with every LoRA variant; made once per session."""
    made: dict[str, Zoo] = {}

    def make(arch: str) -> Zoo:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            base = tiny_model(arch, folder / "base")
            adapters = {
                name: make_lora(base, folder / name, seed=seed, **config)
                for seed, (name, config) in enumerate(lora_variants(arch).items())
            }
            made[arch] = Zoo(base, adapters, Oracles(base, adapters))
        return made[arch]

    return make


@pytest.fixture(scope="session")
def llama(zoo_of: Callable[[str], Zoo]) -> Zoo:
    return zoo_of("llama")
