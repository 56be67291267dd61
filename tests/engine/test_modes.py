"""Whatever the engine does with pages, chunks and queues, the tokens are those of the adapter alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import Zoo
from tests.engine.harness import Driver, Stream, assert_alone, random_prompt
from tests.support.models import ARCHITECTURES

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "pages of 1": {"block_size": 1},
    "odd pages": {"block_size": 7, "max_num_batched_tokens": 17},
    "two rows": {"max_num_seqs": 2},
    "two slots": {"max_adapters": 2, "block_size": 4},
    "no host memory": {"max_adapters": 2, "adapter_host_memory": 1},
}


def burst(driver: Driver, zoo: Zoo, count: int = 24, **params: object) -> list[Stream]:
    """Requests to every adapter and the base; half of them share a long prefix."""
    rng = random.Random(7)
    names = [*zoo.adapters, None]
    shared = random_prompt(rng, 30, 31)
    streams = []
    for i in range(count):
        prompt = random_prompt(rng) if i % 2 else shared + random_prompt(rng, 1, 6)
        streams.append(driver.add(prompt, names[i % len(names)], **params))
    return streams


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, llama: Zoo) -> None:
    driver = llama.driver(**MODES[mode])
    for stream in (*burst(driver, llama), *burst(driver, llama, prompt_logprobs=1)):
        assert stream.last is None
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


# Of every kind of positions and windows; tests/engine/test_parity.py has all architectures in chunks.
UNLIKE = ("llama", "mistral", "gemma3", "gpt2", "opt")


@pytest.mark.parametrize(
    "caching", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["prefix cache", "no prefix cache"]
)
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in UNLIKE else pytest.mark.slow) for arch in ARCHITECTURES]
)
def test_preemption_in_small_chunks(arch: str, caching: bool, zoo_of: Callable[[str], Zoo]) -> None:
    """Pages for a few rows and chunks of a few tokens: rows are preempted, recomputed, and say the same."""
    zoo = zoo_of(arch)
    engine = zoo.engine(block_size=4)
    page = engine.runner.cache
    page_bytes = sum(t[0].nbytes for t in (*page.keys, *page.values))
    driver = zoo.driver(
        block_size=4,
        max_model_len=64,
        kv_cache_memory=page_bytes * 40,
        max_num_batched_tokens=32,
        enable_prefix_caching=caching,
    )
    burst(driver, zoo, 14, max_tokens=18)
    driver.run(driver.engine.check_integrity)
    assert driver.engine.stats().preemptions > 0
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


def test_prefix_cache_is_used_and_never_shared_between_adapters_or_salts(llama: Zoo) -> None:
    driver = llama.driver(block_size=4)
    prompt = list(range(3, 40))
    runs = [("all-linear", None), ("all-linear", None), ("rslora", None), (None, None), (None, "s"), (None, "s")]
    for adapter, salt in runs:
        driver.add(prompt, adapter, cache_salt=salt)
        driver.run()
    cached = [stream.request for stream in driver.streams.values()]
    hits = driver.engine.stats().prefix_cache_hits
    assert hits == 2 * 36, f"two of {len(cached)} requests repeat an earlier one of the same identity"
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


def test_an_adapter_named_like_a_salt_shares_no_blocks() -> None:
    from weft.server.engine.blocks import root_key

    keys = {
        root_key("m", None, None),
        root_key("m", "a", None),
        root_key("m", None, "a"),
        root_key("m", "a", ""),
        root_key("ma", None, None),
        root_key("m", "a", "b"),
        root_key("m", "ab", None),
        root_key("m", "", None),
    }
    assert len(keys) == 8


def test_cancelling_frees_everything_at_once(llama: Zoo) -> None:
    driver = llama.driver(block_size=4, max_num_seqs=4)
    streams = burst(driver, llama, max_tokens=100)
    for _ in range(5):
        driver.step()
    for stream in streams[::2]:
        driver.engine.abort(stream.request.request_id)
    driver.engine.check_integrity()
    driver.step()
    assert all(stream.last is not None and stream.last.finish_reason == "abort" for stream in streams[::2])
    for stream in streams[1::2]:
        driver.engine.abort(stream.request.request_id)
    driver.run()
    stats = driver.engine.stats()
    assert stats.running == stats.waiting == stats.blocks_used == 0
    assert set(stats.refcounts.values()) == {0}
