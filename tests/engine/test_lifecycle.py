"""Adapters come, go and change places while others decode; nobody notices."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import Zoo
from tests.engine.harness import Driver, Oracles, assert_alone, random_prompt
from tests.support.adapters import make_lora
from weft.adapters.errors import AdapterError, AdapterTooLarge
from weft.server.errors import NotFound


@pytest.fixture(scope="module")
def fifty(llama: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fifty adapters of ranks 1 to 24 on the base of ``llama``."""
    folder = tmp_path_factory.mktemp("fifty")
    rng = random.Random(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        f"v{i}": make_lora(
            llama.base,
            folder / str(i),
            seed=100 + i,
            r=rng.randrange(1, 25),
            target_modules=rng.sample(targets, rng.randrange(1, 8)),
        )
        for i in range(50)
    }


def test_fifty_adapters_come_and_go_while_sixteen_streams_decode(llama: Zoo, fifty: dict[str, Path]) -> None:
    driver = llama.driver(max_adapters=6, max_num_seqs=64, block_size=4)
    engine = driver.engine
    before = engine.stats()
    rng = random.Random(1)
    names = [*llama.adapters, None]
    for i in range(16):
        driver.add(random_prompt(rng), names[i % len(names)], max_tokens=120)
    pending = list(fifty)
    workers: list[threading.Thread] = []
    registered: set[str] = set()
    requested: set[str] = set()

    def load(version: str) -> None:
        engine.register_adapter(version, fifty[version])
        registered.add(version)

    def churn() -> None:
        if pending and sum(worker.is_alive() for worker in workers) < 2:
            workers.append(threading.Thread(target=load, args=(pending.pop(),)))
            workers[-1].start()
        for version in registered - requested:
            requested.add(version)
            driver.add(random_prompt(rng), version, max_tokens=6)
            engine.unregister_adapter(version)  # its request is in flight: it must finish on this version

    driver.run(churn)
    while pending or registered != requested or any(worker.is_alive() for worker in workers):
        churn()
        driver.step()
    driver.run()
    engine.poll()
    oracles = Oracles(llama.base, {**llama.adapters, **fifty})
    for stream in driver.streams.values():
        assert_alone(stream, oracles[stream.request.adapter])
    after = engine.stats()
    assert requested == set(fifty)
    assert set(after.tiers) == set(llama.adapters), "every unloaded adapter is forgotten"
    assert after.host_bytes == before.host_bytes
    assert after.evictions > 0
    engine.check_integrity()


def test_requests_in_flight_finish_on_their_version(llama: Zoo, fifty: dict[str, Path]) -> None:
    """A replace is another version under the same name: two versions decode side by side for a while."""
    driver = llama.driver()
    old = driver.add(list(range(3, 20)), "rslora", max_tokens=30)
    for _ in range(5):
        driver.step()
    driver.engine.register_adapter("v1", fifty["v1"])
    driver.engine.unregister_adapter("rslora")
    new = driver.add(list(range(3, 20)), "v1", max_tokens=30)
    with pytest.raises(NotFound):
        driver.add([3], "rslora")
    driver.run()
    driver.engine.poll()
    assert_alone(old, llama.oracles["rslora"])
    assert_alone(new, Oracles(llama.base, fifty)["v1"])
    assert "rslora" not in driver.engine.stats().tiers


def test_memory_returns(llama: Zoo) -> None:
    driver = llama.driver()
    for name in llama.adapters:
        driver.add([3, 4, 5], name)
    driver.run()
    assert driver.engine.stats().device_bytes > 0
    for name in llama.adapters:
        driver.engine.unregister_adapter(name)
    driver.engine.poll()
    stats = driver.engine.stats()
    assert stats.device_bytes == stats.host_bytes == stats.slots_used == 0
    assert stats.tiers == {}
    driver.engine.check_integrity()


def test_an_adapter_whose_files_vanish_fails_its_own_requests_only(
    llama: Zoo, fifty: dict[str, Path], tmp_path: Path
) -> None:
    copy = make_lora(llama.base, tmp_path / "a", seed=5, r=4, target_modules=["q_proj"])
    driver = llama.driver(adapter_host_memory=1)
    driver.engine.register_adapter("lost", copy)
    driver.engine.register_adapter("v2", fifty["v2"])  # takes the place in host memory
    for file in copy.iterdir():
        file.unlink()
    lost = driver.add([3, 4, 5], "lost")
    well = driver.add([3, 4, 5], "v2")
    driver.run()
    assert lost.last is not None and lost.last.finish_reason == "error" and "adapter" in str(lost.last.error)
    assert_alone(well, Oracles(llama.base, fifty)["v2"])


def test_a_broken_adapter_leaves_nothing_behind(llama: Zoo, tmp_path: Path) -> None:
    broken = make_lora(llama.base, tmp_path / "a", r=4, target_modules=["q_proj"])
    (broken / "adapter_model.safetensors").write_bytes(b"not a tensor")
    engine = llama.engine()
    before = engine.stats()
    with pytest.raises(AdapterError):
        engine.register_adapter("broken", broken)
    assert engine.stats() == before


def test_an_adapter_that_answers_nonsense_harms_nobody_else(llama: Zoo, tmp_path: Path) -> None:
    """Weights so large that the activations overflow: its own request ends with an error, its pages are clean."""
    huge = make_lora(llama.base, tmp_path / "huge", r=8, scale=1e30, target_modules=["q_proj", "k_proj", "v_proj"])
    driver = llama.driver(block_size=4, kv_cache_memory=200_000, max_model_len=64)
    driver.engine.register_adapter("huge", huge)
    rng = random.Random(3)
    nonsense = [driver.add(random_prompt(rng), "huge") for _ in range(3)]
    streams = [driver.add(random_prompt(rng), name) for name in (*llama.adapters, None)]
    driver.run()
    streams += [driver.add(random_prompt(rng), name) for name in (*llama.adapters, None)]
    driver.run()
    assert all(stream.last is not None and stream.last.finish_reason == "error" for stream in nonsense)
    for stream in streams:
        assert_alone(stream, llama.oracles[stream.request.adapter])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype: str, llama: Zoo) -> None:
    """In 16 bit the reference is peft in fp32; the tolerance is that of the format over three layers."""
    driver = llama.driver(dtype=dtype)
    rng = random.Random(2)
    for name in (*llama.adapters, None):
        driver.add(random_prompt(rng), name, max_tokens=1, prompt_logprobs=0)
    driver.run()
    bound = {"bfloat16": 0.35, "float16": 0.05}[dtype]
    for stream in driver.streams.values():
        prompt = stream.request.prompt_token_ids
        expected = llama.oracles[stream.request.adapter].logits(prompt).log_softmax(-1)
        expected = expected[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        given = torch.tensor([e.logprob for e in stream.prompt_logprobs or [] if e is not None])
        assert (given - expected).abs().max() < bound


def test_loading_never_runs_in_the_steps_thread(llama: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that takes its time: others go on, its own request waits."""
    driver = llama.driver()
    upload = driver.engine.adapters.pool.upload
    gate = threading.Event()

    def slow(*args: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        gate.wait(20)
        upload(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(driver.engine.adapters.pool, "upload", slow)
    waiting = driver.add([3, 4, 5], "rslora")
    base = driver.add([3, 4, 5], None)
    while base.last is None:
        driver.step()
    assert waiting.tokens == []
    gate.set()
    driver.run()
    assert_alone(waiting, llama.oracles["rslora"])
    assert_alone(base, llama.oracles[None])


def test_slots_are_used_in_turn_when_all_are_wanted(llama: Zoo) -> None:
    """More adapters than slots, all waiting at once: none starves, none evicts another before it ran."""
    driver = llama.driver(max_adapters=1, max_num_seqs=8)
    for name in (*llama.adapters, *llama.adapters):
        driver.add([3, 4, 5, 6], name)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])
    assert driver.engine.stats().loads <= 2 * len(llama.adapters)


def test_a_pinned_adapter_is_loaded_at_once_and_never_evicted(llama: Zoo) -> None:
    driver = llama.driver(max_adapters=2)
    engine = driver.engine
    engine.pin_adapters(["rslora"])
    while not engine.adapters.idle:
        engine.poll()
    assert engine.stats().tiers["rslora"] == "device"
    for name in (*llama.adapters, *llama.adapters):
        driver.add([3, 4, 5], name)
    driver.run(lambda: _is_on_device(driver, "rslora"))
    assert engine.stats().evictions > 0
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


def _is_on_device(driver: Driver, version: str) -> None:
    assert driver.engine.stats().tiers[version] == "device"


def test_pins_that_would_starve_others_are_refused(llama: Zoo, fifty: dict[str, Path]) -> None:
    engine = llama.engine(max_adapters=2)
    with pytest.raises(AdapterTooLarge, match="max-adapters"):
        engine.pin_adapters(["rslora", "rank-1"])
    engine.pin_adapters(["rslora"])
    engine.unregister_adapter("rslora")
    engine.poll()
    engine.pin_adapters(["rank-1"])
    engine.register_adapter("v3", fifty["v3"])
    engine.check_integrity()


def test_counters_of_adapters_that_are_gone_do_not_pile_up(llama: Zoo) -> None:
    driver = llama.driver()
    driver.add([3, 4], "rslora")
    driver.add([3, 4], None)
    driver.run()
    assert set(driver.engine.stats().adapters) == {"", "rslora"}
    driver.engine.unregister_adapter("rslora")
    driver.engine.poll()
    assert set(driver.engine.stats().adapters) == {""}
