"""Hundreds of weightings of a few adapters on a live server, and the search for weights beside everybody's requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn

from tests.engine.harness import Oracles, Stream
from tests.engine.test_compositions import World
from tests.http.conftest import ADMIN, ADMIN_KEY
from tests.http.fakes import byte_level_tokenizer
from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.adapters.composition import Composition, Member
from weft.server.config import EngineConfig
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
from weft.server.http.state import ServerState
from weft.server.observability.logs import LogConfig
from weft.server.observability.metrics import Metrics
from weft.server.registry.compositions import Compositions
from weft.server.registry.proxies import Proxies
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient
from weft.server.tokenization import Tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one engine for all

SLOTS = 32
IDS = tuple(f"hub-{index}" for index in range(5))
PROMPTS = ("the quick", "the lazy dog", "jumps over")
TOKENS = 4
SAMPLE = 8
"""Answers that are compared with the formula."""
MAX_GROWTH = 8 << 20
"""Bytes that eight hundred weightings more may add to the engine's process; each takes some 50 kB of a slot.

The first thousand are not counted: until then the allocator still finds out what it will keep."""


@dataclass
class Live:
    """A server on a socket with five adapters, 32 slots and its engine in a process of its own."""

    http: httpx.AsyncClient
    client: EngineClient
    registry: AdapterRegistry
    tokenizer: Tokenizer
    world: World

    async def complete(self, **body: Any) -> list[int]:
        asked = {"model": "base", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        reply = await self.http.post("/v1/completions", json=asked | body)
        assert reply.status_code == 200, reply.text
        tokens: list[int] = reply.json()["choices"][0]["token_ids"]
        return tokens

    def resident(self) -> int:
        """Bytes of memory that the engine's process has."""
        lines = Path(f"/proc/{self.client.pid}/status").read_text().splitlines()
        [size] = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
        return int(size) * 1024

    def formula(self, asked: dict[str, Any]) -> list[int]:
        """What peft generates with the composed weights alone."""
        members = tuple(Member(each["id"], each["weight"]) for each in asked["adapters"])
        composition = Composition(members, asked["combination"])
        stream = Stream(EngineRequest("r", [5], SamplingParams(), composition=composition))
        return self.world.oracle(stream).generate(self.tokenizer.encode(asked["prompt"]), TOKENS).tokens

    async def idle(self) -> None:
        """Wait until nothing runs or waits; nothing is held then, and no page is."""
        async with asyncio.timeout(30):
            while True:
                stats = await self.client.refresh_stats()
                if not stats.running and not stats.waiting:
                    break
                await asyncio.sleep(0.02)
        assert stats.blocks_used == 0 and not any(stats.refcounts.values())
        assert stats.slots_used <= SLOTS and set(stats.tiers) == {self.registry.get(id).version for id in IDS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    root = tmp_path_factory.mktemp("served")
    tokenizer = byte_level_tokenizer()
    base = tiny_model("llama", root / "base", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    tokenizer.save_pretrained(base)
    alike: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
    folders = {id: make_lora(base, root / id, seed=seed, **alike) for seed, id in enumerate(IDS)}
    client = EngineClient(
        EngineConfig(str(base), device="cpu", dtype="float32", max_adapters=SLOTS), logging=LogConfig("warning")
    )
    await client.start()
    state_dir = tmp_path_factory.mktemp("state")
    registry = AdapterRegistry(client, state_dir, roots=[root], base_name="base")
    for id, folder in folders.items():
        await registry.load(id, str(folder))
    loaded = Tokenizer.load(str(base), max_model_len=client.info.max_model_len)
    assert loaded is not None
    compositions, proxies = Compositions(state_dir, registry), Proxies(state_dir, registry)
    keys, metrics = Keyring(ADMIN_KEY), Metrics(client, registry)
    state = ServerState(client, registry, loaded, metrics, keys, ("base",), compositions, proxies)
    server = uvicorn.Server(uvicorn.Config(create_app(state), port=0, log_config=None, timeout_keep_alive=600))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    limits = httpx.Limits(max_connections=128)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as http:
        yield Live(http, client, registry, loaded, World(base, folders, root / "mixed", Oracles(base, folders)))
    server.should_exit = True
    await serving
    state.workers.close()
    await client.stop()


def weightings(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of which no two weigh the adapters alike."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        members = [{"id": id, "weight": rng.uniform(-1, 1)} for id in rng.sample(IDS, rng.randint(1, len(IDS)))]
        made.append(
            {"prompt": rng.choice(PROMPTS), "adapters": members, "combination": rng.choice(["linear", "lorahub"])}
        )
    return made


async def serve(live: Live, asked: list[dict[str, Any]]) -> None:
    """More of them at a time than there are slots; none fails, and those looked at are what the formula says."""
    places = asyncio.Semaphore(3 * SLOTS)

    async def complete(body: dict[str, Any]) -> list[int]:
        async with places:
            return await live.complete(**body)

    before = (await live.client.refresh_stats()).compositions
    answers = await asyncio.gather(*map(complete, asked))
    assert (await live.client.refresh_stats()).compositions - before >= len(asked), "no weighting served for another"
    for body, tokens in list(zip(asked, answers, strict=True))[:: len(asked) // SAMPLE]:
        assert tokens == live.formula(body)
    assert len({tuple(tokens) for tokens in answers}) > len(PROMPTS), "the weights matter"
    await live.idle()


async def fit(live: Live, **fields: Any) -> str:
    """Start a search for weights; its job."""
    examples = [{"prompt": f"{prompt} {number}", "completion": " fox"} for prompt in PROMPTS for number in range(4)]
    body = {"candidates": IDS[:3], "examples": examples, "save_as": "mix", **fields}
    reply = await live.http.post("/admin/compositions/fit", json=body, headers=ADMIN)
    assert reply.status_code == 202, reply.text
    job: str = reply.json()["id"]
    return job


async def card(live: Live, job: str) -> Any:
    return (await live.http.get(f"/admin/jobs/{job}", headers=ADMIN)).json()


async def test_a_search_in_rounds_beside_live_requests(live: Live) -> None:
    expected = {id: live.world.oracles[id].generate(live.tokenizer.encode(PROMPTS[0]), TOKENS).tokens for id in IDS}
    job = await fit(live, round_size=8, budget=24)
    served = 0
    async with asyncio.timeout(120):
        while (now := await card(live, job))["state"] == "running":
            for id in IDS:
                assert await live.complete(model=id, prompt=PROMPTS[0]) == expected[id]
                served += 1
    assert now["state"] == "succeeded", now
    assert served and len(now["losses"]) == 24 and now["result"]["loss"] < now["losses"][0]
    await live.http.delete("/admin/compositions/mix", headers=ADMIN)
    await live.idle()


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA"])
async def test_a_search_is_cancelled_within_a_round(live: Live, optimizer: str) -> None:
    job = await fit(live, optimizer=optimizer, round_size=64, budget=640)
    async with asyncio.timeout(60):
        while not (await live.client.refresh_stats()).waiting:  # a row ends with the step that computes its prompt
            await asyncio.sleep(0.005)
    ended = (await live.http.delete(f"/admin/jobs/{job}", headers=ADMIN)).json()
    assert ended["state"] == "cancelled" and len(ended["losses"]) < 640 and len(ended["losses"]) % 64 == 0
    await live.idle()
    assert (await live.http.get("/admin/compositions/mix", headers=ADMIN)).status_code == 404
    [asked] = weightings(1, seed=9)
    assert await live.complete(**asked) == live.formula(asked)


async def test_a_hundred_weightings_through_32_slots(live: Live) -> None:
    await serve(live, weightings(100, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_thousand_weightings_leave_nothing_behind(live: Live) -> None:
    asked = weightings(1800, seed=2)
    await serve(live, asked[:1000])
    early = live.resident()
    await serve(live, asked[1000:])
    late = live.resident()
    print(f"resident memory of the engine after 1000 weightings: {early >> 10} kB, after 1800: {late >> 10} kB")
    assert late - early < MAX_GROWTH
    for id in IDS:
        await live.registry.unload(id)
    async with asyncio.timeout(30):
        while (stats := await live.client.refresh_stats()).slots_used or stats.tiers:
            await asyncio.sleep(0.02)
    assert stats.device_bytes == 0 and stats.host_bytes == 0 and stats.blocks_used == 0
    for id in IDS:  # for whoever comes after
        await live.registry.load(id, str(live.world.adapters[id]))
