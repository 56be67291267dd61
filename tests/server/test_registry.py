"""Ids, versions, leases and the manifest, with the real store and sources and a stand-in for the engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.server.conftest import StartClient, adapter_folder, until
from tests.server.fake_engine import expected_tokens
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterSourceError, AdapterTooLarge
from weft.adapters.store import Store, digest
from weft.server.config import ConfigError
from weft.server.engine.info import AdapterInfo
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, NotFound, RequestError
from weft.server.registry import incoming, manifest
from weft.server.registry.records import AdapterRecord, Held, check_id
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient


class Host:
    """The engine, as the registry sees it. ``gate`` holds registrations up while it is clear."""

    def __init__(self) -> None:
        self.on_restart: list[Callable[[], Awaitable[None]]] = []
        self.known: set[str] = set()
        self.pins: dict[str | None, set[str]] = {}
        self.max_pinned = 1000
        self.registrations = 0
        self.models: list[tuple[str, str | None]] = []  # what is known, and of which model
        self.refuse: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled: list[str] = []
        self.revoke: Callable[[RequestError], None] = lambda error: None

    @property
    def pinned(self) -> set[str]:
        return set().union(*self.pins.values())

    async def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo:
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.refuse:
            raise self.refuse
        assert digest(folder) == version
        self.registrations += 1
        self.known.add(version)
        self.models.append((version, model))
        return AdapterInfo(version, "LORA", ("LowRank",), 8, 4, 1024)

    async def unregister_adapter(self, version: str, model: str | None = None) -> None:
        await asyncio.sleep(0)
        self.models.remove((version, model))
        if any(known == version for known, _ in self.models):
            return
        self.known.remove(version)
        for pins in self.pins.values():
            pins.discard(version)

    async def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None:
        wanted = set(versions)
        assert wanted <= {known for known, of in self.models if of == model}
        if len(wanted) > self.max_pinned:
            raise AdapterTooLarge("pinned adapters take all slots", param="max_adapters")
        self.pins[model] = wanted

    def cancel_streams(self, id: str, error: Callable[[], RequestError]) -> int:
        self.cancelled.append(id)
        self.revoke(error())
        return 1

    async def restart(self) -> None:
        self.known.clear()
        self.models.clear()
        self.pins.clear()
        for hook in self.on_restart:
            await hook()


class Bench:
    """A registry, its state directory, and sources: ``a``, ``b``, ``c`` of different content; ``a2`` equals ``a``."""

    def __init__(self, root: Path, base_name: str = "base", proxy_models: tuple[str, ...] = ("small",)) -> None:
        self.root = root
        self.state = root / "state"
        self.sources = root / "sources"
        if not self.sources.exists():
            for name, rank in (("a", 1), ("b", 2), ("c", 3), ("a2", 1)):
                adapter_folder(self.sources, name, r=rank)
        self.host = Host()
        self.registry = AdapterRegistry(
            self.host, self.state, roots=[self.sources], base_name=base_name, proxy_models=proxy_models
        )

    def source(self, name: str) -> str:
        return str(self.sources / name)

    def version(self, name: str) -> str:
        return digest(self.sources / name)

    async def load(self, id: str, name: str | None = None) -> AdapterRecord:
        return await self.registry.load(id, self.source(name or id))

    async def settle(self) -> None:
        await until(lambda: not self.registry._tasks)
        await self.registry._versions.settle()

    def stored(self) -> set[str]:
        return set(Store(self.state / "store").versions())

    def listed(self) -> dict[str, str]:
        """Ids and versions, as the manifest has them."""
        path = self.state / manifest.FILE
        entries = json.loads(path.read_text())["adapters"] if path.exists() else []
        return {entry["id"]: entry["version"] for entry in entries}

    def check(self, **expected: str) -> None:
        """Exactly these ids on these sources, everywhere, and nothing left of anything else."""
        versions = {id: self.version(name) for id, name in expected.items()}
        assert {r.id: r.version for r in self.registry.list()} == versions
        assert {r.state for r in self.registry.list()} <= {"ready"}
        assert self.listed() == versions
        assert self.stored() == self.host.known == set(versions.values())
        assert [p for p in self.state.rglob("*") if "incoming" in p.name and p.name != "incoming"] == []


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_load_serves_and_unload_frees(bench: Bench) -> None:
    gone: list[str] = []
    bench.registry.on_unloaded.append(gone.append)
    record = await bench.load("a")
    assert (record.id, record.version, record.state) == ("a", bench.version("a"), "ready")
    assert record.info.rank == 8 and bench.registry.get("a") == record
    bench.check(a="a")
    with bench.registry.lease("a") as leased:
        assert leased == record
    await bench.registry.unload("a")
    bench.check()
    assert gone == ["a"]
    for use in (bench.registry.get, lambda id: bench.registry.lease(id).__enter__()):
        with pytest.raises(NotFound, match="'a'"):
            use("a")


async def test_a_taken_id_is_a_conflict_also_while_loading(bench: Bench) -> None:
    bench.host.gate.clear()
    first = asyncio.create_task(bench.load("x", "a"))
    await asyncio.sleep(0.1)
    assert bench.registry.get("x").state == "loading"
    with pytest.raises(NotFound, match="loading"), bench.registry.lease("x"):
        pass
    for clash in (bench.load("x", "b"), bench.registry.replace("x", bench.source("b")), bench.registry.unload("x")):
        with pytest.raises(Conflict):
            await clash
    bench.host.gate.set()
    await first
    with pytest.raises(Conflict, match="exists already") as error:
        await bench.load("x", "b")
    assert error.value.code == "adapter_exists"
    bench.check(x="a")


async def test_of_two_concurrent_loads_of_an_id_one_wins(bench: Bench) -> None:
    results = await asyncio.gather(bench.load("x", "a"), bench.load("x", "b"), return_exceptions=True)
    assert [type(r) for r in results] == [AdapterRecord, Conflict]
    bench.check(x="a")


async def test_equal_content_is_one_version_for_all_its_ids(bench: Bench) -> None:
    await asyncio.gather(bench.load("one", "a"), bench.load("two", "a2"))
    assert bench.host.registrations == 1
    bench.check(one="a", two="a2")
    await bench.registry.unload("one")
    bench.check(two="a")
    await bench.registry.unload("two")
    bench.check()


async def test_reloading_while_the_last_copy_is_freed(bench: Bench) -> None:
    for _ in range(20):
        await bench.load("one", "a")
        await asyncio.gather(bench.registry.unload("one"), bench.load("two", "a"))
        bench.check(two="a")
        await bench.registry.unload("two")
    bench.check()


async def test_replace_moves_new_requests_only(bench: Bench) -> None:
    await bench.load("x", "a")
    with bench.registry.lease("x") as old:
        bench.host.gate.clear()
        replacing = asyncio.create_task(bench.registry.replace("x", bench.source("b")))
        await asyncio.sleep(0.1)
        with bench.registry.lease("x") as during:
            assert during.version == bench.version("a")
        bench.host.gate.set()
        new = await replacing
        assert new.version == bench.version("b") and new.created == old.created
        with bench.registry.lease("x") as after:
            assert after.version == bench.version("b")
        assert bench.host.known == bench.stored() == {bench.version("a"), bench.version("b")}
    await bench.settle()
    bench.check(x="b")


async def test_replace_honours_if_match(bench: Bench) -> None:
    await bench.load("x", "a")
    with pytest.raises(Conflict) as error:
        await bench.registry.replace("x", bench.source("b"), if_match=bench.version("b"))
    assert error.value.code == "precondition_failed"
    bench.check(x="a")
    await bench.registry.replace("x", bench.source("b"), if_match=bench.version("a"), pinned=True)
    assert bench.registry.get("x").pinned
    bench.check(x="b")
    with pytest.raises(NotFound):
        await bench.registry.replace("y", bench.source("b"))


async def test_replace_by_the_same_content_keeps_it(bench: Bench) -> None:
    await bench.load("x", "a")
    await bench.registry.replace("x", bench.source("a2"))
    bench.check(x="a")
    assert bench.registry.get("x").source == bench.source("a2")
    assert bench.host.registrations == 1


async def test_a_failed_replace_leaves_the_old_one(bench: Bench) -> None:
    await bench.load("x", "a")
    bench.host.refuse = AdapterMismatch("wrong shape", param="lora_A")
    with pytest.raises(AdapterMismatch):
        await bench.registry.replace("x", bench.source("b"))
    bench.check(x="a")


async def test_unload_waits_for_requests_and_takes_no_new_ones(bench: Bench) -> None:
    await bench.load("x", "a")
    with bench.registry.lease("x"):
        await bench.registry.replace("x", bench.source("b"))
        with bench.registry.lease("x"):
            unloading = asyncio.create_task(bench.registry.unload("x"))
            await asyncio.sleep(0.1)
            assert bench.registry.get("x").state == "draining"
            with pytest.raises(NotFound, match="draining"), bench.registry.lease("x"):
                pass
            with pytest.raises(Conflict, match="draining"):
                await bench.load("x", "c")
            with pytest.raises(NotFound):
                await bench.registry.replace("x", bench.source("c"))
            assert bench.listed() == {}
        await asyncio.sleep(0.1)
        assert not unloading.done(), "a request on the version before the replace is still in flight"
    await unloading
    bench.check()


async def test_force_after_ends_stragglers(bench: Bench) -> None:
    await bench.load("x", "a")
    ended: asyncio.Future[RequestError] = asyncio.get_running_loop().create_future()
    bench.host.revoke = lambda error: None if ended.done() else ended.set_result(error)

    async def straggler() -> RequestError:
        with bench.registry.lease("x"):
            return await ended

    request = asyncio.create_task(straggler())
    await asyncio.sleep(0)
    patient = asyncio.create_task(bench.registry.unload("x"))
    await asyncio.sleep(0.15)
    assert bench.host.cancelled == []
    await bench.registry.unload("x", force_after=0.1)  # joins the first
    await patient
    error = await request
    assert isinstance(error, Conflict) and error.code == "adapter_unloaded" and "'x'" in str(error)
    bench.check()


async def test_a_cancelled_unload_still_drains(bench: Bench) -> None:
    await bench.load("x", "a")
    with bench.registry.lease("x"):
        unloading = asyncio.create_task(bench.registry.unload("x"))
        await asyncio.sleep(0.05)
        unloading.cancel()
        await asyncio.wait({unloading})
        assert bench.registry.get("x").state == "draining"
    await bench.settle()
    bench.check()


@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside another id of the same content"])
@pytest.mark.parametrize("stage", ["source", "store", "refused", "bug", "engine", "manifest"])
async def test_a_failure_at_any_stage_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, stage: str, held: bool
) -> None:
    before = {}
    if held:
        await bench.load("other", "a2")
        before = {"other": "a2"}
        bench.host.known.clear()
        bench.host.models.clear()  # so that the next load registers again
        bench.registry._versions._versions[Held(bench.version("a"))].registered = False
    source, error = bench.source("a"), OSError
    failure = OSError(28, "No space left on device")

    def fail(*args: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        match stage:
            case "source":
                source, error = str(bench.root / "elsewhere"), AdapterSourceError
            case "store":
                patch.setattr(bench.registry._store, "add", fail)
            case "manifest":
                patch.setattr(manifest, "_replace", fail)
            case _:
                bench.host.refuse = {
                    "refused": AdapterMismatch("wrong shape"),
                    "bug": RuntimeError("a bug"),
                    "engine": EngineUnavailable("it died"),
                }[stage]
                error = type(bench.host.refuse)
        with pytest.raises(error):
            await bench.registry.load("x", source)
    bench.host.refuse = None
    await bench.host.restart()
    bench.check(**before)
    await bench.load("x", "a")
    bench.check(x="a", **before)


async def test_a_failed_manifest_write_leaves_an_unload_undone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.load("x", "a")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_replace", fail)
        with pytest.raises(OSError, match="No space"):
            await bench.registry.unload("x")
    bench.check(x="a")
    await bench.registry.unload("x")
    bench.check()


async def test_cancelled_while_fetching_nothing_happened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(source: str, *, roots: object, cache: Path) -> Path:
        cache.mkdir(parents=True)
        (cache / "half").touch()
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)
        return bench.sources / "a"

    with monkeypatch.context() as patch:
        patch.setattr(incoming, "resolve", slow)
        loading = asyncio.create_task(bench.load("x", "a"))
        await asyncio.sleep(0.05)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
    assert bench.registry.list() == []
    record = await bench.load("x", "b")
    release.set()
    await until(lambda: list((bench.state / "incoming").iterdir()) == [])
    assert bench.registry.get("x") == record
    bench.check(x="b")


async def test_cancelled_while_installing_it_completes(bench: Bench) -> None:
    bench.host.gate.clear()
    loading = asyncio.create_task(bench.load("x", "a"))
    await until(lambda: len(bench.stored()) == 1)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    bench.host.gate.set()
    await bench.settle()
    bench.check(x="a")


async def test_the_registry_survives_a_restart(bench: Bench) -> None:
    await bench.load("x", "a")
    await bench.load("y", "b")
    await bench.registry.replace("y", bench.source("c"), pinned=True)
    before = bench.registry.list()
    for name in ("a", "b", "c", "a2"):
        (bench.sources / name / "adapter_config.json").write_text("{}")  # the sources are not looked at again
    again = Bench(bench.root)
    assert await again.registry.restore() == []
    assert again.registry.list() == before
    assert again.host.known == again.stored() == {r.version for r in before}


async def test_what_a_crash_left_is_cleaned_up(bench: Bench) -> None:
    await bench.load("x", "a")
    Store(bench.state / "store").add(bench.sources / "b")
    (bench.state / "incoming" / "half").mkdir(parents=True)
    again = Bench(bench.root)
    assert await again.registry.restore() == []
    again.check(x="a")


async def test_a_damaged_copy_is_not_served_but_remembered(bench: Bench) -> None:
    await bench.load("x", "a")
    await bench.load("y", "b")
    broken = bench.state / "store" / bench.version("a") / "adapter_model.safetensors"
    broken.chmod(0o600)
    broken.write_bytes(b"tampered")
    again = Bench(bench.root)
    (problem,) = await again.registry.restore()
    assert "'x'" in problem and "damaged" in problem
    assert again.registry.get("x").state == "failed" and again.registry.get("y").state == "ready"
    with pytest.raises(NotFound, match="damaged"), again.registry.lease("x"):
        pass
    assert again.host.known == {again.version("b")}
    with pytest.raises(Conflict):
        await again.load("x", "a")
    # A replace from the source heals it.
    await again.registry.replace("x", again.source("a"))
    again.check(x="a", y="b")


async def test_an_id_that_has_become_the_base_s_name_is_not_served(bench: Bench) -> None:
    await bench.load("x", "a")
    again = Bench(bench.root, base_name="X")
    (problem,) = await again.registry.restore()
    assert "name of a base" in problem and again.registry.get("x").state == "failed"
    assert again.host.known == set()


async def test_an_adapter_of_a_proxy_model_remembers_it(bench: Bench) -> None:
    version = bench.version("a")
    record = await bench.registry.load("x", bench.source("a"), base="small", pinned=True)
    assert record.base == "small" and bench.host.models == [(version, "small")]
    await bench.load("y", "a")  # the same content, for the main model
    assert bench.host.models == [(version, "small"), (version, None)]
    with pytest.raises(InvalidRequest, match="there is no model") as caught:
        await bench.registry.load("z", bench.source("a"), base="big")
    assert caught.value.param == "base"
    with pytest.raises(Conflict, match="unload it first"):
        await bench.registry.ensure("x", bench.source("b"))
    again = Bench(bench.root)
    assert await again.registry.restore() == []
    assert sorted(again.host.models, key=str) == [(version, "small"), (version, None)]
    assert [again.registry.get(id).base for id in "xy"] == ["small", None] and again.host.pinned == {version}
    await again.host.restart()
    assert sorted(again.host.models, key=str) == [(version, "small"), (version, None)]
    assert (await again.registry.replace("x", again.source("b"))).base == "small"
    await again.registry.unload("y")
    assert again.host.models == [(again.version("b"), "small")] and again.stored() == {again.version("b")}


async def test_one_content_stays_in_the_store_while_a_model_has_it(bench: Bench) -> None:
    await bench.registry.load("x", bench.source("a"), base="small")
    await bench.load("y", "a")
    with bench.registry.lease("x"):
        unloading = asyncio.create_task(bench.registry.unload("x"))
        await bench.registry.unload("y")
        assert bench.host.models == [(bench.version("a"), "small")] and bench.stored() == {bench.version("a")}
    await unloading
    assert bench.host.models == [] and bench.stored() == set()


async def test_an_adapter_whose_proxy_model_is_gone_waits_for_it(bench: Bench) -> None:
    await bench.registry.load("x", bench.source("a"), base="small", pinned=True)
    without = Bench(bench.root, proxy_models=())
    (problem,) = await without.registry.restore()
    assert "'small'" in problem and without.registry.get("x").state == "failed" and without.host.models == []
    again = Bench(bench.root)
    assert await again.registry.restore() == [] and again.registry.get("x").state == "ready"
    without = Bench(bench.root, proxy_models=())
    await without.registry.restore()
    await without.registry.unload("x")
    assert not await Bench(bench.root).registry.restore() and not Bench(bench.root).registry.list()


async def test_a_manifest_without_bases_is_read_and_written_as_before(bench: Bench) -> None:
    await bench.load("x", "a")
    (entry,) = json.loads((bench.state / manifest.FILE).read_text())["adapters"]
    assert "base" not in entry and "pinned" in entry and "created" in entry


async def test_a_lost_copy_can_be_unloaded(bench: Bench) -> None:
    await bench.load("x", "a")
    Store(bench.state / "store").remove(bench.version("a"))
    again = Bench(bench.root)
    assert len(await again.registry.restore()) == 1
    await again.registry.unload("x")
    again.check()


@pytest.mark.parametrize(
    "content", ["", "{", '{"schema": 2, "adapters": []}', '{"schema": 1, "adapters": [{"id": 1}]}']
)
async def test_a_damaged_manifest_stops_the_start_and_touches_nothing(bench: Bench, content: str) -> None:
    await bench.load("x", "a")
    (bench.state / manifest.FILE).write_text(content)
    with pytest.raises(ConfigError, match=manifest.FILE):
        Bench(bench.root)
    assert bench.stored() == {bench.version("a")}


async def test_ensure_loads_replaces_or_leaves(bench: Bench) -> None:
    ensure = bench.registry.ensure
    await ensure("x", bench.source("a"), pinned=True)
    again = Bench(bench.root)
    await again.registry.restore()
    registrations = again.host.registrations
    record = await again.registry.ensure("x", again.source("a"), pinned=True)
    assert record.pinned and again.host.registrations == registrations
    (again.sources / "a" / "adapter_config.json").write_text('{"r": 77}')
    assert (await again.registry.ensure("x", again.source("a"), pinned=True)).version == again.version("a")
    again.check(x="a")
    await again.registry.ensure("x", again.source("b"))
    again.check(x="b")


async def test_an_engine_restart_replays_what_is_held(bench: Bench) -> None:
    await bench.load("x", "a")
    await bench.load("y", "b")
    with bench.registry.lease("y"):
        await bench.registry.replace("y", bench.source("c"))
        await bench.host.restart()
        assert bench.host.known == {bench.version(name) for name in "abc"}
    await bench.settle()
    bench.check(x="a", y="c")


async def test_an_adapter_refused_at_replay_fails_until_the_next(bench: Bench) -> None:
    await bench.load("x", "a")
    bench.host.refuse = AdapterFormatError("the disk is gone")
    await bench.host.restart()
    assert (bench.registry.get("x").state, bench.registry.get("x").error) == ("failed", "the disk is gone")
    bench.host.refuse = EngineUnavailable("it died again")
    with pytest.raises(EngineUnavailable):
        await bench.host.restart()
    bench.host.refuse = None
    await bench.host.restart()
    bench.check(x="a")


@pytest.mark.parametrize("seed", range(4))
async def test_random_interleavings_leave_a_consistent_state(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    ids, names = ["p", "q", "r"], ["a", "b", "c", "a2"]

    async def use(id: str) -> None:
        with bench.registry.lease(id) as record:
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(chance.random() / 200)
                assert record.version in bench.host.known and record.version in bench.stored()

    async def actor() -> None:
        for _ in range(25):
            id, name = chance.choice(ids), chance.choice(names)
            action = chance.choice([bench.load, bench.registry.replace, bench.registry.unload, use, use])
            arguments = {bench.load: (id, name), bench.registry.replace: (id, bench.source(name))}.get(action, (id,))
            task = asyncio.create_task(action(*arguments))
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() / 100)
                task.cancel()
            with suppress(Conflict, NotFound, asyncio.CancelledError):
                await task

    await asyncio.gather(*(actor() for _ in range(6)))
    await bench.settle()
    by_version = {bench.version(name): name for name in names}
    bench.check(**{record.id: by_version[record.version] for record in bench.registry.list()})


@pytest.mark.parametrize(
    "id", ["a", "my-org.adapter_v1:2", "x" * 256, "ünïcode", "日本語", "with space", "a.b", "__main__", "100%"]
)
def test_good_ids(id: str) -> None:
    check_id(id, ("base", "Other"))


@pytest.mark.parametrize(
    "id",
    [
        "", "x" * 257, "x" * 10_000, "a/b", "..", "a..b", ".", "a,b", "a\\b", "a\0b", "a\nb", "a\x1b[0m", "\x7f",
        " a", "a ", "base", "BASE", "other", "__base__", "e\u0301", "\uff41", "\u202eabc", "a\u200bb", "\ud800",
        "a\u00a0b",
    ],
    ids=ascii,
)  # fmt: skip
def test_bad_ids(id: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_id(id, ("base", "Other"))
    assert error.value.param == "id"
    assert len(str(error.value)) < 600


async def test_over_the_real_process(running: StartClient, tmp_path: Path) -> None:
    """Replace, kill and forced unload, with streams in flight."""

    async def stream(client: EngineClient, registry: AdapterRegistry, id: str, tokens: int) -> tuple[str, list[int]]:
        with registry.lease(id) as record:
            params = SamplingParams(max_tokens=tokens)
            request = EngineRequest(f"{id}-{random.random()}", [5], params, record.version, id)
            return record.version, [t async for delta in client.generate(request) for t in delta.token_ids]

    async with running() as client:
        sources = tmp_path / "sources"
        a, b = adapter_folder(sources, "a", r=1), adapter_folder(sources, "b", r=2)
        refused = adapter_folder(sources, "refused", refuse=True)
        registry = AdapterRegistry(client, tmp_path / "state", roots=[sources], base_name="base")
        await registry.restore()
        await registry.load("x", str(a))
        with pytest.raises(AdapterMismatch):
            await registry.load("y", str(refused))
        before = asyncio.create_task(stream(client, registry, "x", 100))
        await until(lambda: client.stats.running == 1)
        await registry.replace("x", str(b))
        after = await stream(client, registry, "x", 10)
        assert not before.done()
        assert after == (digest(b), expected_tokens([5], digest(b), 10))
        assert await before == (digest(a), expected_tokens([5], digest(a), 100))
        await until(lambda: set(client.stats.tiers) == {digest(b)})

        with ExitStack() as stack:
            stack.enter_context(pytest.raises(EngineUnavailable))
            doomed = asyncio.create_task(stream(client, registry, "x", 100_000))
            await until(lambda: client.stats.running == 1)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await doomed
        await until(lambda: client.ready)
        assert await stream(client, registry, "x", 10) == after

        straggler = asyncio.create_task(stream(client, registry, "x", 100_000))
        await until(lambda: client.stats.running == 1)
        await registry.unload("x", force_after=0.1)
        with pytest.raises(Conflict, match="'x' was unloaded"):
            await straggler
        await client.refresh_stats()
        await until(lambda: client.stats.running == 0 and client.stats.tiers == {})


async def test_pins_follow_ids_through_their_life(bench: Bench) -> None:
    await bench.registry.load("x", bench.source("a"), pinned=True)
    await bench.load("y", "b")
    assert bench.host.pinned == {bench.version("a")}
    await bench.registry.replace("x", bench.source("c"))
    assert bench.host.pinned == {bench.version("c")}, "a replaced adapter stays pinned"
    await bench.registry.replace("y", bench.source("b"), pinned=True)
    assert bench.host.pinned == {bench.version("b"), bench.version("c")}
    await bench.host.restart()
    assert bench.host.pinned == {bench.version("b"), bench.version("c")}, "pinned again in a new engine"
    await bench.registry.replace("y", bench.source("b"), pinned=False)
    await bench.registry.unload("x")
    assert bench.host.pinned == set()


async def test_a_pin_that_leaves_no_room_is_refused_and_leaves_nothing_behind(bench: Bench) -> None:
    bench.host.max_pinned = 1
    await bench.registry.load("x", bench.source("a"), pinned=True)
    with pytest.raises(AdapterTooLarge):
        await bench.registry.load("y", bench.source("b"), pinned=True)
    bench.check(x="a")
    assert bench.host.pinned == {bench.version("a")}


async def test_pins_survive_a_restart_of_the_server(bench: Bench, tmp_path: Path) -> None:
    await bench.registry.load("x", bench.source("a"), pinned=True)
    again = Bench(tmp_path)
    assert await again.registry.restore() == []
    assert again.host.pinned == {again.version("a")}
