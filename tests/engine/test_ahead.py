"""Steps launched before the tokens of the one before are known: the same answers, and nothing given back too early.

There is no GPU here, so every step is done when it was launched. That a launch waits for nothing is seen by the order
of launches and reads, and by sampling on a device that has no values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import Zoo
from tests.engine.harness import Driver, Stream, random_prompt
from tests.support.adapters import make_lora
from tests.support.models import VOCAB_SIZE, tiny_model
from weft.server.config import EngineConfig
from weft.server.engine import flight, mixing, pending, sampler
from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.engine.engine import Engine
from weft.server.engine.mixing import Place
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import Mix, Sequence

SMALL = "small"
HUGE = "huge"
"""An adapter that answers nonsense."""
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "few slots": {"max_adapters": 3, "max_num_seqs": 8, "max_num_batched_tokens": 12, "enable_prefix_caching": False},
    "few pages": {"block_size": 4, "max_model_len": 96, "pages": 40, "max_num_batched_tokens": 64},
}


@pytest.fixture(scope="module")
def worlds(llama: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The llama zoo with an adapter that answers nonsense, and the folder of a smaller model of fewer tokens."""
    folder = tmp_path_factory.mktemp("ahead")
    targets = ["q_proj", "k_proj", "v_proj"]
    huge = make_lora(llama.base, folder / HUGE, r=8, scale=1e30, target_modules=targets)
    tiny_model("gpt2", folder / SMALL, seed=5, vocab_size=VOCAB_SIZE - 10)
    return replace(llama, adapters={**llama.adapters, HUGE: huge})


def small_of(worlds: Zoo) -> str:
    return str(worlds.adapters[HUGE].parent / SMALL)


def engine_of(worlds: Zoo, *, ahead: bool, pages: int | None = None, **settings: Any) -> Engine:
    settings = {"proxy_models": ((SMALL, small_of(worlds)),), "async_scheduling": ahead, **settings}
    if pages is not None:
        settings["kv_cache_memory"] = page_bytes(worlds, settings["block_size"]) * pages
    return worlds.engine(**settings)


def page_bytes(worlds: Zoo, block_size: int) -> int:
    """Of a page of both models."""
    models = Engine(EngineConfig(str(worlds.base), dtype="float32", proxy_models=((SMALL, small_of(worlds)),))).models
    caches = [model.runner.cache for model in models.values()]
    tokens = sum(tensor[0, 0].nbytes for cache in caches for tensor in (*cache.keys, *cache.values))
    return tokens * block_size


@dataclass(frozen=True)
class Ask:
    """A request, the step it arrives in and that it is aborted in."""

    request: EngineRequest
    arrival: int
    abort: int | None


def params_of(rng: random.Random) -> SamplingParams:
    chosen: dict[str, Any] = {"max_tokens": rng.choice([1, 6, 24, 24]), "ignore_eos": rng.random() < 0.5}
    chosen["temperature"] = rng.choice([0.0, 0.0, 0.7, 1.3])
    chosen["seed"] = rng.randrange(1000)
    options: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.9, "frequency_penalty": 0.6},
        {"min_tokens": rng.randint(0, chosen["max_tokens"])},
        {"logit_bias": {7: 3.0, 11: -2.0}},
        {"logprobs": rng.choice([0, 3])},
        {"prompt_logprobs": 1},
    ]
    for option in rng.sample(options, rng.randrange(5)):
        chosen |= option
    if rng.random() < 0.3:
        chosen["stop_token_ids"] = tuple(rng.sample(range(2, VOCAB_SIZE - 10), 12))
    return SamplingParams(**chosen)


def asks(worlds: Zoo, seed: int, count: int = 24) -> list[Ask]:
    """A mixture of everything; half of the prompts begin alike, so that pages are shared."""
    rng = random.Random(seed)
    names: list[str | None] = [*(name for name in worlds.adapters if name != HUGE), None, None]
    alike = [rng.randrange(3, VOCAB_SIZE - 10) for _ in range(20)]
    made = []
    for index in range(count):
        prompt = [rng.randrange(3, VOCAB_SIZE - 10) for _ in range(rng.randrange(2, 24))]
        prompt = alike + prompt[:8] if rng.random() < 0.5 else prompt
        params, arithmetic = params_of(rng), None
        if rng.random() < 0.25:
            own = None if params.prompt_logprobs is not None else alike[: rng.randrange(1, 14)]
            terms = (Term(0.7, SMALL), Term(-0.4, None, rng.choice(["rslora", "head"]), prompt_token_ids=own))
            arithmetic = LogitArithmetic(terms, top_p=rng.choice([None, 0.9]))
        name = HUGE if index % 10 == 3 else rng.choice(names)
        request = EngineRequest(f"{seed}-{index}", prompt, params, adapter=name, adapter_name=name)
        arrival = rng.randrange(8)
        abort = arrival + rng.randrange(9) if index % 10 == 5 else None
        made.append(Ask(replace(request, arithmetic=arithmetic), arrival, abort))
    return made


def play(engine: Engine, asked: list[Ask]) -> dict[str, Stream]:
    """Run them to their ends; nothing is out of place after any step."""
    streams: dict[str, Stream] = {}
    step = 0
    while len(streams) < len(asked) or engine.has_work:
        for ask in asked:
            name = ask.request.request_id
            if ask.arrival == step:
                engine.add(ask.request)
                streams[name] = Stream(ask.request)
            if name in streams and ask.abort == step:
                engine.abort(name)
        before = engine.steps
        deltas = engine.step()
        for delta in deltas:
            streams[delta.request_id].take(delta)
        engine.check_integrity()
        if not deltas and engine.steps == before:
            engine.wait(0.01)
        step += 1
        assert step < 5000, "no progress"
    assert all(stream.last is not None for stream in streams.values()), "every request has one last delta"
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and set(stats.refcounts.values()) == {0}
    assert not any(lane.pins(name) for lane in [engine.adapters] for name in stats.refcounts)
    return streams


def check_same(one: Stream, other: Stream) -> None:
    assert one.last is not None and other.last is not None
    if one.request.adapter == HUGE:  # what overflows depends on how a prompt was cut, so on what else was there
        return
    if "abort" in (one.last.finish_reason, other.last.finish_reason):
        count = min(len(one.tokens), len(other.tokens))
        assert one.tokens[:count] == other.tokens[:count]
        return
    assert one.tokens == other.tokens
    for what in ("finish_reason", "stop_reason", "error"):
        assert getattr(one.last, what) == getattr(other.last, what)
    for mine, its in ((one.logprobs, other.logprobs), (one.prompt_logprobs or [], other.prompt_logprobs or [])):
        assert len(mine) == len(its)
        for a, b in zip(mine, its, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.token_id == b.token_id and len(a.top) == len(b.top)
                assert [a.logprob, *(p for _, p in a.top)] == pytest.approx(
                    [b.logprob, *(p for _, p in b.top)], abs=1e-3
                )


@pytest.mark.parametrize("mode", SETTINGS)
def test_answers_are_the_same(mode: str, worlds: Zoo) -> None:
    engines = [engine_of(worlds, ahead=ahead, **SETTINGS[mode]) for ahead in (False, True)]
    asked = asks(worlds, seed=list(SETTINGS).index(mode))
    waiting, ahead = (play(engine, asked) for engine in engines)
    for name, stream in waiting.items():
        check_same(stream, ahead[name])
    reasons = {stream.last.finish_reason for stream in waiting.values() if stream.last is not None}
    assert reasons == {"stop", "length", "abort", "error"}, "the mixture has every end"
    if "pages" in SETTINGS[mode]:
        assert all(engine.stats().preemptions for engine in engines)
    # What was generated is found again in the pages, and means the same.
    again = [
        replace(ask, request=replace(ask.request, prompt_token_ids=ask.request.prompt_token_ids + tokens[:20]))
        for ask in asked
        if len(tokens := waiting[ask.request.request_id].tokens) > 3 and ask.request.arithmetic is None
    ]
    waiting, ahead = (play(engine, again) for engine in engines)
    for name, stream in waiting.items():
        check_same(stream, ahead[name])


@dataclass
class Order:
    """Launches, reads and preemptions, one after the other, as steps that were under way when they happened."""

    under_way: int = 0
    launched: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    seen = Order()

    def spy(owner: Any, name: str, tell: Callable[[Any], None]) -> None:
        real = getattr(owner, name)

        def spied(self: Any, *args: Any) -> Any:
            if name != "launch":
                tell(None)
            result = real(self, *args)
            if name == "launch":
                tell(result)
            return result

        monkeypatch.setattr(owner, name, spied)

    def launched(result: Any) -> None:
        if result is not None:
            seen.launched.append(seen.under_way)
            seen.under_way += 1

    def read(_: Any) -> None:
        seen.under_way -= 1

    spy(flight.Launcher, "launch", launched)
    spy(flight.Readback, "read", read)
    spy(Scheduler, "preempt", lambda _: seen.preempted.append(seen.under_way))
    return seen


def decoding(driver: Driver) -> None:
    """Requests of every kind that decode for a while."""
    arithmetic = LogitArithmetic((Term(0.5, SMALL),), top_p=0.9)
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"min_tokens": 9, "logit_bias": {5: 1.0}},
    ]
    rng = random.Random(0)
    for index, kind in enumerate(kinds):
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **kind})
        request = EngineRequest(f"r{index}", random_prompt(rng, 3, 9), params)
        if index == 0:
            request = replace(request, arithmetic=arithmetic)
        driver.engine.add(request)
        driver.streams[request.request_id] = Stream(request)


def test_steps_of_every_kind_are_launched_ahead(worlds: Zoo, order: Order) -> None:
    driver = Driver(engine_of(worlds, ahead=True))
    decoding(driver)
    driver.run()
    assert order.launched == [0, *[1] * 11], "each but the first while the one before is under way"
    assert order.under_way == 0


def test_it_is_off_on_a_cpu(worlds: Zoo, order: Order) -> None:
    driver = worlds.driver(proxy_models=((SMALL, small_of(worlds)),))
    decoding(driver)
    driver.run()
    assert order.launched == [0] * 12


def test_nobody_is_preempted_while_a_step_is_under_way(worlds: Zoo, order: Order) -> None:
    """Who is preempted is recomputed from its tokens, so they must be there: such a step waits for the one before."""
    driver = Driver(engine_of(worlds, ahead=True, **SETTINGS["few pages"]))
    for index in range(12):
        driver.add(list(range(3 + index, 15 + index)), max_tokens=18)
    driver.run(driver.engine.check_integrity)
    assert order.preempted and not any(order.preempted)
    assert order.launched.count(1) > order.launched.count(0) > 1


def test_what_ended_keeps_its_place_until_the_device_is_done_with_it(worlds: Zoo) -> None:
    engine = engine_of(worlds, ahead=True, block_size=4)
    driver = Driver(engine)
    free = engine.stats()
    probe = driver.add([5, 6, 7], "rslora", max_tokens=4)
    driver.run()
    at = next(i for i, token in enumerate(probe.tokens) if i and token not in probe.tokens[:i])
    stopped = driver.add([5, 6, 7], "rslora", max_tokens=30, stop_token_ids=(probe.tokens[at],))
    while stopped.last is None:
        driver.step()
    assert stopped.tokens == probe.tokens[: at + 1] and stopped.last.stop_reason == probe.tokens[at]
    # The step behind has its slot and its pages; an adapter that is being loaded must not get the one.
    assert engine.adapters.pins("rslora") == 1 and engine.stats().blocks_used > 0 and engine.has_work
    engine.check_integrity()
    driver.step()
    assert engine.adapters.pins("rslora") == 0 and engine.stats().blocks_used == free.blocks_used
    assert not engine.has_work


def test_streams_abreast_are_not_held_up_once_their_first_token_is_under_way(worlds: Zoo) -> None:
    """Decoding rows leave too little of a step for all streams of a request, for whose prompt it is reserved."""
    said = []
    for ahead in (False, True):
        driver = Driver(engine_of(worlds, ahead=ahead, max_num_batched_tokens=6, max_num_seqs=8))
        others = [driver.add([5, 6, 7], "rslora", max_tokens=60) for _ in range(5)]
        for _ in range(8):
            driver.step()
        terms = (Term(1.0, None, "head"), Term(-1.0, None, "rslora"), Term(0.5, SMALL))
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
        scored = EngineRequest("scored", list(range(3, 15)), params, arithmetic=LogitArithmetic(terms))
        driver.engine.add(scored)
        driver.streams["scored"] = Stream(scored)
        driver.run(driver.engine.check_integrity)
        assert len(driver.streams["scored"].tokens) == 6
        said.append([driver.streams["scored"], *others])
    for one, other in zip(*said, strict=True):
        check_same(one, other)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_generated_is_found_again(ahead: bool, worlds: Zoo) -> None:
    driver = Driver(engine_of(worlds, ahead=ahead, block_size=4))
    first = driver.add([5, 6, 7, 8, 9], max_tokens=20)
    driver.run()
    driver.add([5, 6, 7, 8, 9, *first.tokens], max_tokens=1)
    driver.run()
    assert driver.engine.stats().prefix_cache_hits == 24, "all pages that are full of computed tokens"


def test_a_request_is_aborted_under_way_and_its_id_used_again(worlds: Zoo) -> None:
    engine = engine_of(worlds, ahead=True)
    driver = Driver(engine)
    other = driver.add([9, 8, 7], max_tokens=20)
    first = EngineRequest("again", [3, 4, 5], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    driver.streams["again"] = Stream(first)
    engine.add(first)
    for _ in range(4):
        driver.step()
    engine.abort("again")
    engine.check_integrity()
    driver.step()
    aborted = driver.streams["again"]
    assert aborted.last is not None and aborted.last.finish_reason == "abort"
    driver.streams["again"] = Stream(first)
    engine.add(first)
    driver.run()
    assert driver.streams["again"].tokens[: len(aborted.tokens)] == aborted.tokens
    assert len(driver.streams["again"].tokens) == len(other.tokens) == 20


@pytest.mark.parametrize("aborted", [False, True])
def test_nonsense_leaves_no_trace(worlds: Zoo, aborted: bool) -> None:
    """Also of a request that was aborted before anybody could know."""
    engine = engine_of(worlds, ahead=True, block_size=4)
    driver = Driver(engine)
    nonsense = driver.add([3, 4, 5, 6, 7], HUGE)
    well = driver.add([3, 4, 5, 6, 7], max_tokens=20)
    while not engine.adapters.pins(HUGE):
        driver.step()
    if aborted:
        engine.abort(nonsense.request.request_id)
    driver.run()
    assert nonsense.last is not None and nonsense.last.finish_reason == ("abort" if aborted else "error")
    assert not nonsense.tokens and len(well.tokens) == 20
    cache = engine.runner.cache
    assert all(tensor.isfinite().all() for tensor in (*cache.keys, *cache.values))


@pytest.fixture
def valueless(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device whose tensors have no values, so that to ask for one is an error, as are copies that are waited for."""

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a copy from memory that is not pinned waits for the device")

    def to_device(host: np.ndarray[Any, Any], device: torch.device | str) -> torch.Tensor:
        return torch.from_numpy(host).to(device)

    for module in (mixing, pending, sampler):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(torch, "tensor", refused)
    yield torch.device("meta")


def test_tokens_are_chosen_without_asking_the_device(valueless: torch.device) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"logprobs": 3},
        {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"min_tokens": 8, "max_tokens": 9, "stop_token_ids": (4,), "logit_bias": {3: 1.0}},
    ]
    seqs = [Sequence.start(EngineRequest("r", [5, 6], SamplingParams(**kind)), b"", 100) for kind in kinds]
    for index, seq in enumerate(seqs):
        seq.tokens += [7, pending.placeholder(index)]
    logits = torch.empty(len(seqs), 300, device=valueless)
    sampled = torch.empty(len(seqs), dtype=torch.int64, device=valueless)
    chosen = sampler.Sampler((1,)).choose(logits, seqs, None, sampled)
    assert chosen.tokens.device == valueless and chosen.indices == [2] * len(seqs)


def test_what_is_no_number_gives_a_token_that_every_model_knows() -> None:
    """The next step may have run with it before anybody could see that it is none."""
    logits = torch.zeros(3, 300)
    logits[0, 299], logits[1, 299], logits[2, 299] = torch.nan, torch.inf, 1.0
    seqs = [Sequence.start(EngineRequest("r", [5], SamplingParams(temperature=0.0)), b"", 9) for _ in range(3)]
    assert sampler.Sampler((1,)).choose(logits, seqs).tokens.tolist() == [0, 0, 299]


def test_logits_are_mixed_without_asking_the_device(valueless: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "MixTerms", type("Terms", (), {"build": staticmethod(lambda *args: None)}))
    monkeypatch.setattr(mixing, "logit_mix", lambda *args: None)
    leader, follower = (Sequence.start(EngineRequest("r", [5], SamplingParams()), b"", 9) for _ in range(2))
    leader.mix, leader.followers, follower.leader = Mix(250, 0.9), [follower], leader
    sources = [torch.empty(2, 300, device=valueless), torch.empty(1, 250, device=valueless)]
    places = [Place(leader, {leader: (0, 1), follower: (1, 0)})]
    assert mixing._distributions(places, sources, 300, (1,)).shape == (1, 300)
    assert mixing._peaks(places, sources).shape == (1,)


def test_a_pending_token_is_taken_from_the_step_under_way() -> None:
    sampled = torch.tensor([40, 41, 42])
    ids = pending.to_ids([7, pending.placeholder(2), 8, pending.placeholder(0)], sampled, torch.device("cpu"))
    assert ids.tolist() == [7, 42, 8, 40]
    assert pending.to_ids([], None, torch.device("cpu")).tolist() == []
