"""Compositions of adapters in mixed batches, against peft with the composed weights alone; their life, their limits."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    FourierFTConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    PrefixTuningConfig,
    ShiraConfig,
)
from safetensors.torch import load_file, save_file

from tests.engine.harness import Driver, Oracles, Stream, assert_alone, random_prompt
from tests.engine.mixtures import mixture_variants
from tests.support.adapters import PeftReference, make_adapter, make_lora
from tests.support.models import tiny_model
from weft.adapters.composition import Combination, Composition, Member
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.request import COMPOSED, EngineRequest, SamplingParams, TokenDelta
from weft.server.errors import InvalidRequest, NotFound
from weft.server.fitting import PRIORITY
from weft.server.llm import LLM

LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj"]
HUB: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS}


def lora_configs() -> dict[str, dict[str, Any]]:
    """LoRAs alike, so that LoRAHub can mix them, but for their scales; and some of other shapes."""
    return {
        **{f"hub-{index}": HUB for index in range(5)},
        "hub-alpha": {**HUB, "lora_alpha": 20},
        "hub-rs": {**HUB, "use_rslora": True},
        "rank-7": {**HUB, "r": 7},
        "everything": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "bias": "all"},
        "shifted": {"r": 9, "lora_alpha": 9, "target_modules": ["k_proj", "up_proj"], "lora_bias": True},
        "ends": {"r": 5, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    }


def family_configs() -> dict[str, Any]:
    """Other methods, of every additive form."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    return {
        "adalora": AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=LINEARS, **common),
        "loha": LoHaConfig(r=3, alpha=6, target_modules=LINEARS, **common),
        "lokr": LoKrConfig(r=3, alpha=6, target_modules=LINEARS, **common),
        "hira": HiraConfig(r=4, target_modules=LINEARS, **common),
        "shira": ShiraConfig(r=4, random_seed=1, target_modules=["q_proj", "up_proj"], **common),
        "shira-too": ShiraConfig(r=3, random_seed=2, target_modules=["q_proj"], **common),
        "fourierft": FourierFTConfig(n_frequency=60, scaling=30.0, target_modules=["v_proj", "o_proj"], **common),
        "beft": BeftConfig(target_modules=["v_proj"], **common),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **common),
        "norms": LNTuningConfig(**common),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, **common),
    }


@dataclass
class World:
    """A base, adapters by name, and what peft computes with each of them or with their sums."""

    base: Path
    adapters: dict[str, Path]
    folder: Path
    oracles: Oracles
    composed: dict[str, PeftReference] = field(default_factory=dict)
    differences: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def driver(self, *names: str, **settings: Any) -> Driver:
        """An engine with those adapters, or all, registered under their names as versions."""
        engine = Engine(EngineConfig(str(self.base), **{"dtype": "float32", "max_adapters": 32, **settings}))
        for name in names or self.adapters:
            engine.register_adapter(name, self.adapters[name])
        return Driver(engine)

    def oracle(self, stream: Stream) -> PeftReference:
        composition = stream.request.composition
        if composition is None:
            return self.oracles[stream.request.adapter]
        if composition.identity not in self.composed:
            make = self._mixed if composition.combination == "lorahub" else self._summed
            self.composed[composition.identity] = make(composition)
        return self.composed[composition.identity]

    def _mixed(self, composition: Composition) -> PeftReference:
        """LoRAHub's ``get_final_weights``: the sum of the tensors under the config of the first adapter."""
        folder = self.folder / composition.identity[-16:]
        first = self.adapters[composition.members[0].version]
        shutil.copytree(first, folder)
        files = [load_file(self.adapters[m.version] / "adapter_model.safetensors") for m in composition.members]
        weights = [m.weight for m in composition.members]
        summed = {
            name: sum(w * file[name].double() for w, file in zip(weights, files, strict=True)).float().contiguous()
            for name in files[0]
        }
        save_file(summed, folder / "adapter_model.safetensors", {"format": "pt"})
        return PeftReference(self.base, folder)

    def _summed(self, composition: Composition) -> PeftReference:
        """The base plus the weighed differences that each adapter makes when peft merges it."""
        oracle = PeftReference(self.base)
        with torch.no_grad():
            for name, parameter in oracle.model.named_parameters():
                terms = [m.weight * self._difference(m.version)[name] for m in composition.members]
                parameter.copy_(parameter.double() + sum(terms))
        return oracle

    def _difference(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.differences:
            own = dict(PeftReference(self.base).model.named_parameters())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SHiRA makes sparse tensors
                merged = PeftReference(self.base, self.adapters[name]).model.merge_and_unload()
            found = {path: tensor.detach().double() for path, tensor in merged.named_parameters()}
            assert found.keys() == own.keys()
            self.differences[name] = {path: tensor - own[path].detach().double() for path, tensor in found.items()}
        return self.differences[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("compositions")
    base = tiny_model("llama", folder / "base")
    adapters = {}
    for seed, (name, fields) in enumerate(lora_configs().items()):
        adapters[name] = make_lora(base, folder / name, seed=seed, **fields)
    for seed, (name, config) in enumerate(family_configs().items()):
        adapters[name] = make_adapter(base, folder / name, config, seed=seed)
    return World(base, adapters, folder / "mixed", Oracles(base, adapters))


def linear(**weights: float) -> Composition:
    return composition("linear", weights)


def hub(**weights: float) -> Composition:
    return composition("lorahub", weights)


def composition(combination: Combination, weights: dict[str, float]) -> Composition:
    return Composition(tuple(Member(name.replace("_", "-"), w) for name, w in weights.items()), combination)


def add(driver: Driver, prompt: Sequence[int], composed: Composition | None, **params: Any) -> Stream:
    settings = {"temperature": 0.0, "max_tokens": 10, "logprobs": 2, "ignore_eos": True, **params}
    name = settings.pop("name", None)
    salt = settings.pop("cache_salt", None)
    request = EngineRequest(
        f"r{len(driver.streams)}",
        list(prompt),
        SamplingParams(**settings),
        adapter_name=name,
        cache_salt=salt,
        composition=composed,
    )
    driver.engine.add(request)
    stream = Stream(request)
    driver.streams[request.request_id] = stream
    return stream


MIXED = [
    hub(hub_0=0.7, hub_1=-0.4, hub_2=0.9),
    hub(hub_3=1.0),
    hub(hub_0=0.5, hub_1=0.0, hub_4=0.5),
    hub(hub_alpha=0.6, hub_0=0.7),  # the first one's scale counts
    hub(hub_0=0.6, hub_alpha=0.7),
    hub(hub_rs=0.6, hub_alpha=0.7, hub_2=-0.2),
    hub(hub_0=0.0, hub_1=0.0),
    linear(hub_0=0.5, rank_7=0.8, everything=-0.3),
    linear(hub_0=1.0),
    linear(hub_0=0.0, hub_1=0.0),
    linear(shifted=0.5, everything=0.5, beft=0.7),
    linear(ends=0.7, hub_2=0.3, loha=0.6),
    linear(lokr=0.6, adalora=0.6, hira=0.9),
    linear(shira=0.8, shira_too=-0.7, hub_0=0.3),
    linear(fourierft=0.8, hira=-0.5, shifted=0.4),
    linear(**{name.replace("-", "_"): 0.25 for name in lora_configs()}),
]


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 40, "block_size": 8}], ids=["whole prompts", "chunked prefill"]
)
def test_compositions_plain_adapters_and_the_base_share_a_batch(settings: dict[str, Any], world: World) -> None:
    driver = world.driver(max_adapters=64, max_num_seqs=64, adapter_memory=1 << 26, **settings)
    rng = random.Random(0)
    for composed in MIXED:
        add(driver, random_prompt(rng, 8, 40), composed, max_tokens=16, prompt_logprobs=0)
    for name in (*world.adapters, None):
        driver.add(random_prompt(rng, 8, 40), name, max_tokens=16)
    driver.run()
    assert driver.engine.stats().compositions == len(MIXED)
    for stream in driver.streams.values():
        assert_alone(stream, world.oracle(stream), 5e-5)


def test_experts_and_routers_are_composed(tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe", tmp_path / "base")
    names = ("experts", "down", "all", "gate-up")
    adapters = {
        name: make_lora(base, tmp_path / name, seed=seed, **mixture_variants("qwen3_moe")[name])
        for seed, name in enumerate(names)
    }
    adapters["more"] = make_lora(base, tmp_path / "more", seed=9, **mixture_variants("qwen3_moe")["experts"])
    mixture = World(base, adapters, tmp_path / "mixed", Oracles(base, adapters))
    driver = mixture.driver()
    for composed in (linear(experts=0.6, down=0.7, all=-0.5, gate_up=0.4), hub(experts=0.6, more=0.7)):
        add(driver, list(range(5, 30)), composed, prompt_logprobs=0)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, mixture.oracle(stream), 2e-4)


def test_twenty_adapters_and_one_named_twice(world: World) -> None:
    driver = world.driver()
    twenty = Composition(tuple(Member(f"hub-{index % 5}", 0.1 * (index - 8)) for index in range(20)), "linear")
    mixed = Composition(tuple(Member(f"hub-{index % 5}", 0.05 * (index - 8)) for index in range(20)), "lorahub")
    streams = [add(driver, [5, 6, 7], composed) for composed in (twenty, mixed)]
    driver.run()
    for stream in streams:
        assert_alone(stream, world.oracle(stream))


def test_what_is_composed_on_the_device_and_in_host_memory_is_the_same(world: World) -> None:
    """In one slot there is no room for the members beside the composition."""
    wide, narrow = (world.driver(max_adapters=count, max_num_seqs=2) for count in (32, 1))
    for composed in MIXED:
        streams = [add(driver, [5, 6, 7, 8], composed) for driver in (wide, narrow)]
        wide.run()
        narrow.run()
        assert streams[0].tokens == streams[1].tokens
        ours, theirs = ([entry.logprob for entry in stream.logprobs] for stream in streams)
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert wide.engine.stats().tiers["hub-0"] == "device"
    assert narrow.engine.stats().loads == 0, "members were brought to the device in vain"


def test_members_in_host_memory_are_read_again(world: World) -> None:
    driver = world.driver("hub-0", "hub-1", "rank-7", max_adapters=1, adapter_host_memory=1)
    stream = add(driver, [5, 6, 7], linear(hub_0=0.5, hub_1=0.5, rank_7=1.0))
    driver.run()
    assert_alone(stream, world.oracle(stream))
    assert driver.engine.stats().host_bytes < 1 << 17


def all_deltas(driver: Driver) -> list[TokenDelta]:
    """All that comes until nothing is live."""
    deltas = []
    while driver.engine.has_work:
        new = driver.engine.step()
        deltas += new
        if not new:
            driver.engine.wait(0.02)
    return deltas


def test_the_cost_of_a_weighting_step_is_told(world: World) -> None:
    driver = world.driver("hub-0", "hub-1")
    plain = driver.add([5, 6], "hub-0")
    driver.run()
    first, beside = (add(driver, [5, 6], hub(hub_0=0.5, hub_1=0.5), logprobs=None) for _ in range(2))
    other = add(driver, [5, 6], hub(hub_0=0.5, hub_1=0.25))
    deltas = all_deltas(driver)
    told = {d.request_id: d.compose_seconds for d in deltas if d.queue_seconds is not None}
    costs = [told[stream.request.request_id] for stream in (first, beside, other)]
    assert all(cost is not None and cost > 0 for cost in costs)
    again = add(driver, [5, 6], hub(hub_0=0.5, hub_1=0.5))
    deltas = all_deltas(driver)
    assert [d.compose_seconds for d in deltas] == [0.0] + [None] * 9
    assert again.request.request_id == deltas[0].request_id and plain.last is not None
    stats = driver.engine.stats()
    assert (stats.compositions, stats.composition_hits) == (2, 1)
    assert stats.composition_seconds_sum == pytest.approx(costs[0] + costs[2])  # type: ignore[operator]
    assert stats.adapters[COMPOSED].generation_tokens == 40
    assert stats.refcounts == {"hub-0": 0, "hub-1": 0}


def test_hundreds_of_weightings_run_through_few_slots(world: World) -> None:
    driver = world.driver(*(f"hub-{index}" for index in range(5)), max_adapters=8, max_num_seqs=16)
    rng = random.Random(4)
    streams, most, entries = [], 0, driver.engine.adapters._entries
    for _ in range(6):
        for _ in range(50):
            weights = {f"hub_{index}": rng.uniform(-1, 1) for index in rng.sample(range(5), rng.randint(1, 5))}
            streams.append(
                add(driver, [5, 6, 7], composition(rng.choice(["linear", "lorahub"]), weights), max_tokens=2)
            )
        driver.run()
        most = max(most, len(entries))
    assert all(stream.last is not None and stream.last.finish_reason == "length" for stream in streams)
    stats = driver.engine.stats()
    assert stats.compositions >= 300 and stats.slots_used <= 8 and most <= 5 + 8
    assert set(stats.adapters) == {COMPOSED}
    for stream in streams[::30]:
        assert_alone(stream, world.oracle(stream))


def scoring(driver: Driver, weightings: int, examples: int) -> list[Stream]:
    """What a search for weights asks for in one round, weighting by weighting."""
    rng = random.Random(7)
    prompts = [random_prompt(rng, 20, 24) for _ in range(examples)]
    streams = []
    for _ in range(weightings):
        composed = hub(hub_0=rng.uniform(-1, 1), hub_1=rng.uniform(-1, 1))
        for prompt in prompts:
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            request = EngineRequest(
                f"r{len(driver.streams)}", prompt, params, None, COMPOSED, priority=PRIORITY, composition=composed
            )
            driver.engine.add(request)
            streams.append(driver.streams.setdefault(request.request_id, Stream(request)))
    return streams


def test_a_round_of_weightings_is_scored_in_one_batch(world: World) -> None:
    driver = world.driver("hub-0", "hub-1", max_num_seqs=128)
    streams = scoring(driver, weightings=8, examples=12)
    driver.engine.step()  # all of them get under way
    while not driver.engine.settled:
        driver.engine.wait(0.02)
        driver.engine.poll()
    driver.run()
    assert driver.engine.stats().max_step_adapters == 8
    assert all(stream.prompt_logprobs for stream in streams)


def test_who_waits_is_served_before_those_that_score(world: World) -> None:
    driver = world.driver("hub-0", "hub-1", "hub-2", max_num_seqs=8, max_adapters=4, max_num_batched_tokens=64)
    streams = scoring(driver, weightings=30, examples=6)
    for _ in range(10):
        driver.step()
    plain = driver.add([5, 6, 7], None, max_tokens=3)
    for _ in range(5):  # a row is free after the step that is under way, and it decodes in every step from then on
        driver.step()
    assert len(plain.tokens) == 3
    before = sum(stream.last is not None for stream in streams)
    tuned = [driver.add([5, 6, 7], name, max_tokens=3) for name in ("hub-1", "hub-2")]
    composed = add(driver, [5, 6, 7], linear(hub_0=0.4, hub_2=0.3), max_tokens=3)
    while not all(stream.last for stream in (*tuned, composed)):
        driver.step()
    after = sum(stream.last is not None for stream in streams)
    assert before < 60 and after < 150, "they do not wait for the round to end"
    driver.run()
    for stream in (plain, *tuned, composed):
        assert_alone(stream, world.oracle(stream))


def test_they_take_turns_with_other_adapters(world: World) -> None:
    """More than there are slots of either, all at once, by names of their own and without."""
    names = [name for name in world.adapters if name != "prefix"]
    driver = world.driver(max_adapters=3, max_num_seqs=8)
    rng = random.Random(5)
    for index, composed in enumerate(MIXED):
        add(driver, random_prompt(rng), composed, name=f"mix-{index % 3}" if index % 2 else None)
    for name in names:
        driver.add(random_prompt(rng), name)
    driver.run()
    assert {f"mix-{index}" for index in range(3)} <= set(driver.engine.stats().adapters)
    for stream in driver.streams.values():
        assert_alone(stream, world.oracle(stream), 5e-5)


def test_members_are_replaced_and_unloaded_under_way(world: World) -> None:
    driver = world.driver("hub-0", "hub-1", max_adapters=4)
    old = add(driver, [5, 6, 7], hub(hub_0=0.5, hub_1=0.7), max_tokens=30)
    for _ in range(8):
        driver.step()
    assert old.tokens
    waiting = add(driver, [5, 6, 7], linear(hub_0=0.5, hub_1=0.2))
    driver.engine.unregister_adapter("hub-1")
    driver.engine.register_adapter("hub-2", world.adapters["hub-2"])  # what the id of hub-1 now stands for
    new = add(driver, [5, 6, 7], hub(hub_0=0.5, hub_2=0.7))
    for composed in (hub(hub_0=0.5, hub_1=0.7), hub(hub_0=0.5, hub_1=0.1)):
        with pytest.raises(NotFound) as error:
            add(driver, [5], composed)
        assert error.value.param == "adapters[1]"
    driver.run()
    driver.engine.poll()
    for stream in (old, waiting, new):
        assert_alone(stream, world.oracle(stream))
    assert set(driver.engine.stats().tiers) == {"hub-0", "hub-2"}
    for name in ("hub-0", "hub-2"):
        driver.engine.unregister_adapter(name)
    driver.engine.poll()
    stats = driver.engine.stats()
    assert stats.slots_used == stats.device_bytes == stats.host_bytes == 0 and not driver.engine.adapters._entries


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_any_traffic_leaves_everything_in_its_place(slots: int, world: World) -> None:
    """Few slots, little host memory, members that come and go, requests that are given up."""
    names = [f"hub-{index}" for index in range(5)]
    driver = world.driver(*names, max_adapters=slots, max_num_seqs=4, adapter_host_memory=1 << 16)
    rng = random.Random(slots)
    answered = []
    for _ in range(120):
        match rng.randrange(14):
            case 0:
                driver.engine.unregister_adapter(rng.choice(names))
            case 1 | 2:
                name = rng.choice(names)
                driver.engine.register_adapter(name, world.adapters[name])
            case 3 if driver.streams:
                driver.engine.abort(rng.choice(list(driver.streams)))
            case 4 | 5:
                with contextlib.suppress(NotFound):
                    answered.append(driver.add([5, 6], rng.choice([*names, None]), max_tokens=rng.randint(1, 5)))
            case _:
                chosen = {name.replace("-", "_"): rng.choice([0.5, -0.5]) for name in rng.sample(names, 2)}
                with contextlib.suppress(NotFound):
                    composed = composition(rng.choice(["linear", "lorahub"]), chosen)
                    answered.append(add(driver, [5, 6], composed, max_tokens=rng.randint(1, 5)))
        driver.step()
        driver.engine.check_integrity()
    driver.run(driver.engine.check_integrity)
    whole = [stream for stream in answered if stream.last is not None and stream.last.finish_reason == "length"]
    assert len(whole) > 25 and all(stream.last is not None for stream in answered)
    for stream in whole:
        assert_alone(stream, world.oracle(stream))


def test_a_request_that_ends_before_its_composition_is_made(world: World) -> None:
    driver = world.driver("hub-0", "hub-1")
    stream = add(driver, [5, 6], linear(hub_0=0.5, hub_1=0.5))
    driver.engine.step()
    driver.engine.abort(stream.request.request_id)
    driver.run()
    driver.engine.unregister_adapter("hub-1")
    while not driver.engine.adapters.idle:
        driver.engine.poll()
    driver.engine.check_integrity()
    assert set(driver.engine.adapters._entries) == {"hub-0"}


def test_weightings_share_no_pages_unless_they_are_the_same(world: World) -> None:
    driver = world.driver("hub-0", "hub-1", block_size=4)
    prompt = list(range(5, 5 + 33))
    hits = [0]

    def cached(composed: Composition, **params: Any) -> int:
        stream = add(driver, prompt, composed, **params)
        driver.run()
        assert_alone(stream, world.oracle(stream))
        hits.append(driver.engine.stats().prefix_cache_hits)
        return hits[-1] - hits[-2]

    assert cached(linear(hub_0=0.5, hub_1=0.0)) == 0
    assert cached(linear(hub_0=0.5, hub_1=-0.0)) == 32
    assert cached(linear(hub_1=0.0, hub_0=0.5)) == 32
    assert cached(linear(hub_0=0.5)) == 0
    assert cached(linear(hub_0=0.0, hub_1=0.5)) == 0
    assert cached(linear(hub_0=0.5, hub_1=1e-7)) == 0
    assert cached(hub(hub_0=0.5, hub_1=0.0)) == 0
    assert cached(hub(hub_1=0.0, hub_0=0.5)) == 0
    assert cached(linear(hub_0=0.5, hub_1=0.0), cache_salt="x") == 0
    driver.add(prompt, "hub-0")
    driver.run()
    assert driver.engine.stats().prefix_cache_hits == hits[-1]


REFUSED: dict[str, tuple[Composition, str, str]] = {
    "no adapter": (linear(), "at least one", "adapters"),
    "unknown": (linear(hub_0=0.5, gone=0.5), "gone", "adapters[1]"),
    "not a number": (linear(hub_0=float("nan")), "finite", "adapters[0].weight"),
    "infinite": (linear(hub_1=0.5, hub_0=float("inf")), "finite", "adapters[1].weight"),
    "beyond 32 bits": (linear(hub_0=1e39), "finite", "adapters[0].weight"),
    "gains": (linear(hub_0=0.5, ia3=0.5), "Gain", "adapters[1]"),
    "norms": (linear(hub_0=0.5, hub_1=0.5, norms=0.0), "Replace", "adapters[2]"),
    "prefix": (linear(prefix=1.0), "PrefixKV", "adapters[0]"),
    "ranks": (hub(hub_0=0.5, rank_7=0.5), "same ranks", "adapters[1]"),
    "modules": (hub(hub_0=0.5, ends=0.5), "same ranks at the same modules|own factors", "adapters[1]"),
    "biases": (hub(everything=0.5), "Bias", "adapters[0]"),
    "factors of another method": (hub(hub_0=0.5, loha=0.5), "LoRA's own factors", "adapters[1]"),
    "pruned ranks": (hub(adalora=0.5), "LoRA's own factors", "adapters[0]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_composed_is_refused_by_its_field(name: str, world: World, shared: Driver) -> None:
    composed, message, param = REFUSED[name]
    with pytest.raises((InvalidRequest, NotFound), match=message) as error:
        add(shared, [5, 6], composed)
    assert error.value.param == param
    shared.engine.check_integrity()


def test_a_request_has_one_adapter_or_a_composition(world: World, shared: Driver) -> None:
    composed = linear(hub_0=0.5)
    params = SamplingParams(max_tokens=1)
    with pytest.raises(InvalidRequest, match="not both"):
        shared.engine.add(EngineRequest("x", [5], params, adapter="hub-0", composition=composed))
    with pytest.raises(InvalidRequest, match="'task_id' has no meaning"):
        shared.engine.add(EngineRequest("x", [5], params, choices={"task_id": 1}, composition=composed))
    shared.engine.check_integrity()


@pytest.fixture(scope="module")
def shared(world: World) -> Driver:
    return world.driver()


def test_a_sum_beyond_the_adapter_memory_is_refused(world: World) -> None:
    driver = world.driver("everything", "rank-7", adapter_memory=160_000)
    many = Composition((Member("everything", 1.0), Member("rank-7", 1.0)) * 10, "linear")
    with pytest.raises(InvalidRequest, match="adapter memory") as error:
        add(driver, [5], many)
    assert error.value.param == "adapters"
    stream = add(driver, [5], linear(rank_7=0.5))
    driver.run()
    assert_alone(stream, world.oracle(stream))


def test_a_member_that_cannot_be_read_again_ends_the_request(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.adapters["hub-1"], tmp_path / "copy")
    driver = world.driver("hub-0", adapter_host_memory=1)
    driver.engine.register_adapter("lost", copy)
    driver.engine.register_adapter("hub-2", world.adapters["hub-2"])  # takes the place in host memory
    for file in copy.iterdir():
        file.unlink()
    lost = add(driver, [5, 6], linear(hub_0=0.5, lost=0.5))
    well = add(driver, [5, 6], linear(hub_0=0.5, hub_2=0.5))
    driver.run()
    assert lost.last is not None and lost.last.finish_reason == "error" and "adapter" in str(lost.last.error)
    assert_alone(well, world.oracle(well))
    shutil.copytree(world.adapters["hub-1"], copy, dirs_exist_ok=True)
    again = add(driver, [5, 6], linear(hub_0=0.5, lost=0.5))
    driver.run()
    assert again.last is not None and again.last.finish_reason == "length"


def test_half_precision_stays_close(world: World) -> None:
    driver = world.driver(dtype="bfloat16", max_adapters=64, max_num_seqs=64, adapter_memory=1 << 26)
    rng = random.Random(2)
    for composed in MIXED:
        add(driver, random_prompt(rng), composed, max_tokens=1, prompt_logprobs=0)
    driver.run()
    for stream in driver.streams.values():
        prompt = stream.request.prompt_token_ids
        expected = world.oracle(stream).logits(prompt).log_softmax(-1)
        expected = expected[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        given = torch.tensor([e.logprob for e in stream.prompt_logprobs or [] if e is not None])
        assert (given - expected).abs().max() < 0.35


def test_offline(world: World) -> None:
    llm = LLM(str(world.base), {name: world.adapters[name] for name in ("hub-0", "hub-1", "ia3")}, dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    weights = {"hub-0": 0.5, "hub-1": -0.7}
    outputs = llm.generate(
        [[5, 6, 7]] * 4, params, adapter=[weights, weights, "hub-1", None], combination=["lorahub", "linear"] * 2
    )
    composed = [hub(hub_0=0.5, hub_1=-0.7), linear(hub_0=0.5, hub_1=-0.7), None, None]
    for output, each in zip(outputs, composed, strict=True):
        name = None if each else output.adapter
        assert name is None or isinstance(name, str)
        oracle = world.oracle(Stream(EngineRequest("r", [5], params, adapter=name, composition=each)))
        assert output.outputs[0].token_ids == oracle.generate([5, 6, 7], 6).tokens
    assert outputs[0].adapter == weights
    alone = llm.generate([5, 6, 7], params, adapter=weights, combination="lorahub")
    assert alone[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    with pytest.raises(NotFound, match="'gone'"):
        llm.generate([5], params, adapter={"hub-0": 1.0, "gone": 1.0})
    with pytest.raises(InvalidRequest, match="Gain"):
        llm.generate([5], params, adapter={"hub-0": 1.0, "ia3": 1.0})
    with pytest.raises(InvalidRequest, match="'combination' has 2 entries"):
        llm.generate([5], params, adapter=weights, combination=["linear", "linear"])
