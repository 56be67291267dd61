"""Named compositions beside the real registry, and forced unloads of what requests are composed of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.server.conftest import StartClient, adapter_folder, until
from weft.adapters.composition import Composition, Member
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.errors import Conflict, InvalidRequest, NotFound
from weft.server.registry.compositions import Compositions, WeighedId
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient

AB = (WeighedId("a", 0.5), WeighedId("b", -1.0))


async def registry(client: EngineClient, root: Path) -> AdapterRegistry:
    """Restored, with what is still to be loaded of ``a``, ``b`` and ``c``."""
    sources = root / "sources"
    if not sources.exists():
        for rank, name in enumerate("abc", 1):
            adapter_folder(sources, name, r=rank)
    made = AdapterRegistry(client, root / "state", roots=[sources], base_name="base")
    return made


async def test_ids_are_shared_and_survive_a_restart(running: StartClient, tmp_path: Path) -> None:
    async with running() as client:
        adapters = await registry(client, tmp_path)
        named = Compositions(tmp_path / "state", adapters)
        for id in ("a", "b"):
            await adapters.load(id, id)
        made = await named.create("ab", AB, "linear")
        with pytest.raises(Conflict, match="composition 'ab' exists already"):
            await adapters.load("ab", "c")
        with pytest.raises(Conflict, match=r"adapter 'a' exists already \(ready\)"):
            await named.create("a", AB, "linear")
        with pytest.raises(InvalidRequest, match="base"):
            await named.create("base", AB, "linear")
        with pytest.raises(NotFound, match="'c'"):
            await named.create("x", [WeighedId("c", 1.0)], "linear")
        with named.reserved("later", "a search"), pytest.raises(Conflict, match="being made by a search"):
            await adapters.load("later", "c")
        loading = asyncio.create_task(adapters.load("c", "c"))
        await asyncio.sleep(0)
        with pytest.raises(Conflict, match="loading"):
            await named.create("c", AB, "linear")
        await loading
        await adapters.load("later", "c")

    async with running() as client:
        adapters = await registry(client, tmp_path)
        again = Compositions(tmp_path / "state", adapters)
        assert again.list() == [made] and again.state(made).state == "broken"
        await adapters.restore()
        assert again.state(made).state == "ready"
        await adapters.unload("b")
        assert again.state(made).error == "its member 'b' is not served"


async def test_a_forced_unload_ends_what_is_composed_of_it(running: StartClient, tmp_path: Path) -> None:
    async with running() as client:
        adapters = await registry(client, tmp_path)
        versions = [(await adapters.load(id, id)).version for id in "abc"]
        composition = Composition(tuple(Member(version, 1.0) for version in versions[:2]), "linear")

        async def stream(id: str, ids: tuple[str, ...]) -> int:
            request = EngineRequest(id, [1, 2], SamplingParams(max_tokens=2000), None, "mix", composition=composition)
            held = [adapters.lease(each) for each in ids]
            with held[0], held[1]:
                return len([delta async for delta in client.generate(request, ids=ids)])

        mixed = asyncio.create_task(stream("r1", ("a", "b")))
        other = asyncio.create_task(stream("r2", ("a", "c")))
        await until(lambda: client.stats.running == 2)
        await adapters.unload("b", force_after=0.1)
        with pytest.raises(Conflict, match="'b' was unloaded"):
            await mixed
        assert not other.done() and [record.id for record in adapters.list()] == ["a", "c"]
        other.cancel()
