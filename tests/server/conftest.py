from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from weft.server.config import EngineConfig
from weft.server.observability.logs import LogConfig
from weft.server.runtime.client import EngineClient, RestartPolicy

WEIGHTS = b"weights"  # neither the store nor the fake engine looks inside


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that happens elsewhere."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def adapter_folder(root: Path, name: str = "adapter", **config: object) -> Path:
    """An adapter as far as the store and ``fake_engine`` look at it; equal ``config`` is equal content."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, **config}))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return folder


StartClient = Callable[..., AbstractAsyncContextManager[EngineClient]]


@pytest.fixture
def make_client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineClient]:
    """Builds clients whose engine process runs ``fake_engine``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")

    def make(model: str = "fake", **options: Any) -> EngineClient:
        policy = options.pop("policy", RestartPolicy(max_failures=3, window=30.0, backoff=0.05, stop_grace=2.0))
        config = EngineConfig(model, **options.pop("config", {}))
        return EngineClient(config, factory="fake_engine:build", logging=LogConfig("error"), policy=policy, **options)

    return make


@pytest.fixture
def running(make_client: Callable[..., EngineClient]) -> StartClient:
    """``async with running() as client``: a started client, stopped at the end."""

    @asynccontextmanager
    async def run(*args: Any, **options: Any) -> AsyncIterator[EngineClient]:
        client = make_client(*args, **options)
        await client.start()
        try:
            yield client
        finally:
            await client.stop()

    return run
