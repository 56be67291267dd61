"""The real engine behind the process boundary: adapters served, killed, replayed, freed."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import count
from pathlib import Path

from tests.server.conftest import until
from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.server.config import EngineConfig
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.observability.logs import LogConfig
from weft.server.observability.metrics import Metrics
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient

IDS = ("a", "b", "c")


async def test_adapters_outlive_the_engine_and_are_freed(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "base")
    for seed, id in enumerate(IDS):
        make_lora(tmp_path / "base", tmp_path / "sources" / id, seed=seed, r=4 + seed)
    config = EngineConfig(str(tmp_path / "base"), max_num_seqs=8, adapter_memory=16 << 20)
    client = EngineClient(config, logging=LogConfig("error"))
    registry = AdapterRegistry(client, tmp_path / "state", roots=[tmp_path / "sources"], base_name="base")
    metrics = Metrics(client, registry)
    numbers = count()

    async def generate(id: str) -> list[int]:
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        with registry.lease(id) as record:
            request = EngineRequest(f"r{next(numbers)}", [5, 6, 7], params, record.version, id)
            return [token async for delta in client.generate(request) for token in delta.token_ids]

    await client.start()
    try:
        assert await registry.restore() == []
        await asyncio.gather(*(registry.load(id, id) for id in IDS))
        before = await asyncio.gather(*map(generate, IDS))
        assert len({tuple(tokens) for tokens in before}) == 3
        assert (await client.refresh_stats()).max_step_adapters == 3

        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.lives == 2 and client.ready, seconds=120)
        assert await asyncio.gather(*map(generate, IDS)) == before

        await client.refresh_stats()
        exposition = metrics.renderer()()[0].decode()
        assert 'weft_generation_tokens_total{adapter="a"} 40.0' in exposition
        await asyncio.gather(*map(registry.unload, IDS))
        await until(lambda: not client.stats.tiers)
        assert (client.stats.slots_used, client.stats.host_bytes, client.stats.device_bytes) == (0, 0, 0)
    finally:
        await client.stop()
