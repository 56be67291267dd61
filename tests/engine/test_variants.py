"""Adapters that depend on the request, in one mixed batch, each request as peft runs its adapter alone."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PolyConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from tests.engine.harness import Driver, Stream, assert_alone, random_prompt
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_adapter, make_lora
from tests.support.models import tiny_model
from weft.adapters.entries import Derivation
from weft.adapters.errors import AdapterError, AdapterTooLarge, AdapterUnsupported
from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.parts import LowRank
from weft.server import LLM, SamplingParams
from weft.server.config import EngineConfig
from weft.server.engine.blocks import root_key
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest
from weft.server.engine.sequence import Sequence
from weft.server.engine.variants import last_occurrence
from weft.server.errors import InvalidRequest, NotFound

RANK = 6
INVOCATION = [70, 71, 72]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


class ActivatedReference(PeftReference):
    """peft with an activated LoRA, which is switched on once, by the prompt, as in peft's ``generate``."""

    def __call__(self, prompt: list[int]) -> ActivatedReference:
        (self._offset,) = calculate_alora_offsets(self.model.peft_config, "default", torch.tensor([prompt]))
        self._prompt_len = len(prompt)
        return self

    def logits(self, ids: Any, prompt_len: int | None = None) -> torch.Tensor:
        offset = None if self._offset is None else self._offset + len(ids) - self._prompt_len
        self._arguments = {"alora_offsets": [offset]}
        return super().logits(ids)


@dataclass(frozen=True)
class World:
    """A base with adapters of every kind that depends on the request, and two that do not."""

    base: Path
    adapters: dict[str, Path]
    oracle: Callable[[Stream], PeftReference]

    def driver(self, **settings: Any) -> Driver:
        engine = Engine(EngineConfig(str(self.base), **{"dtype": "float32", "max_adapters": 16, **settings}))
        for name, folder in self.adapters.items():
            engine.register_adapter(name, folder)
        return Driver(engine)


def truncated(folder: Path, target: Path, rank: int) -> Path:
    """A LoRA of the first ranks of another one."""
    shutil.copytree(folder, target)
    edit_config(target, r=rank, peft_type="LORA")
    edit_tensors(target, lambda t: {n: x[:rank] if "lora_A" in n else x[:, :rank] for n, x in t.items()})
    return target


def make_world(folder: Path, base: Path) -> World:
    task = {"task_type": "CAUSAL_LM"}
    mpt = MultitaskPromptTuningConfig(num_virtual_tokens=21, num_tasks=3, num_ranks=2, **task)
    poly = PolyConfig(r=4, n_tasks=3, n_skills=2, n_splits=2, target_modules=TARGETS, **task)
    adapters = {
        "poly": make_adapter(base, folder / "poly", poly, seed=1),
        "mpt": make_adapter(base, folder / "mpt", mpt, seed=2, scale=20.0),
        "dylora": make_lora(base, folder / "dylora", seed=3, r=RANK, lora_alpha=9, target_modules=TARGETS),
        "alora": make_lora(
            base, folder / "alora", seed=4, r=4, target_modules=TARGETS, alora_invocation_tokens=INVOCATION
        ),
        "alora-head": make_lora(
            base,
            folder / "alora-head",
            seed=5,
            r=3,
            lora_bias=True,
            target_modules=[*TARGETS, "lm_head"],
            alora_invocation_tokens=INVOCATION[:1],
        ),
        "lora": make_lora(base, folder / "lora", seed=6, r=5, target_modules="all-linear"),
    }
    edit_config(adapters["dylora"], peft_type="DYLORA")
    made: dict[object, PeftReference] = {}

    def oracle(stream: Stream) -> PeftReference:
        name, chosen = stream.request.adapter, stream.request.choices
        key = (name, *chosen.items())
        if name in ("alora", "alora-head"):
            if key not in made:
                made[key] = ActivatedReference(base, adapters[name])
            return made[key](stream.request.prompt_token_ids)  # type: ignore[operator, no-any-return]
        if key not in made and name == "dylora":
            rank = chosen.get("lora_rank", RANK)
            made[key] = PeftReference(base, truncated(adapters[name], folder / f"rank-{rank}-{len(made)}", rank))
        elif key not in made:
            made[key] = PeftReference(base, adapters[name] if name else None, chosen.get("task_id"))
        return made[key]

    return World(base, adapters, oracle)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("variants")
    return make_world(folder, tiny_model("llama", folder / "base"))


REQUESTS: list[tuple[str | None, dict[str, int]]] = [
    ("poly", {"task_id": 0}),
    ("mpt", {"task_id": 2}),
    ("dylora", {"lora_rank": 2}),
    ("alora", {}),
    (None, {}),
    ("poly", {"task_id": 2}),
    ("mpt", {"task_id": 0}),
    ("dylora", {}),
    ("alora-head", {}),
    ("lora", {}),
    ("poly", {"task_id": 1}),
    ("mpt", {"task_id": 1}),
    ("dylora", {"lora_rank": RANK}),
    ("alora", {}),
    ("dylora", {"lora_rank": 1}),
    ("alora-head", {}),
]


def invoking_prompt(rng: random.Random) -> list[int]:
    """Invoked never, once, or more than once; at the start, within or at the end."""
    prompt = random_prompt(rng, 3, 40)
    for _ in range(rng.randrange(3)):
        at = rng.choice([0, len(prompt), rng.randrange(len(prompt))])
        prompt[at:at] = INVOCATION
    return prompt


def run_mixed(world: World, driver: Driver, seed: int, rounds: int = 2) -> None:
    rng = random.Random(seed)
    for index in range(rounds * len(REQUESTS)):
        name, choices = REQUESTS[index % len(REQUESTS)]
        logprobs = 1 if index % 3 == 0 else None
        driver.add(invoking_prompt(rng), name, choices, prompt_logprobs=logprobs)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, world.oracle(stream))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 6, "block_size": 4},
        {"enable_prefix_caching": False, "max_adapters": 2},
        {"kv_cache_memory": 190_000, "max_model_len": 110, "block_size": 4},
        {"adapter_host_memory": 1, "max_adapters": 3, "block_size": 8},
    ],
    ids=str,
)
def test_every_choice_in_one_batch_equals_peft(settings: dict, world: World) -> None:
    driver = world.driver(**settings)
    run_mixed(world, driver, seed=len(settings))
    if "kv_cache_memory" in settings:
        assert driver.engine.stats().preemptions > 0


def test_choices_differ(world: World) -> None:
    """Else the comparisons with peft would prove less than they say."""
    driver = world.driver()
    prompt = [5, 17, 3, *INVOCATION, 44, 9]
    streams = [driver.add(prompt, name, choices) for name, choices in REQUESTS[:3] + REQUESTS[5:8] + REQUESTS[10:12]]
    driver.run()
    assert len({tuple(entry.logprob for entry in stream.logprobs) for stream in streams}) == len(streams)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "phi3"])
def test_activated_lora_on_other_architectures(arch: str, tmp_path: Path) -> None:
    base = tiny_model(arch, tmp_path / "base")
    folder = make_lora(
        base, tmp_path / "alora", r=4, target_modules="all-linear", alora_invocation_tokens=INVOCATION[:2]
    )
    driver = Driver(Engine(EngineConfig(str(base), dtype="float32", max_num_batched_tokens=9, block_size=4)))
    driver.engine.register_adapter("alora", folder)
    oracle, rng = ActivatedReference(base, folder), random.Random(0)
    for _ in range(6):
        driver.add(invoking_prompt(rng), "alora", prompt_logprobs=0)
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, oracle(stream.request.prompt_token_ids))


def test_activated_lora_generates_as_peft_generates(world: World) -> None:
    """With peft's own ``generate``, whose decision falls at the prompt, whatever is generated."""
    driver = world.driver()
    prompts = [[5, 9, *INVOCATION, 8], [*INVOCATION, 5, *INVOCATION], [5, 9, 8], [9, 9, 4, *INVOCATION]]
    streams = [driver.add(prompt, "alora", max_tokens=12) for prompt in prompts]
    driver.run()
    model = PeftReference(world.base, world.adapters["alora"]).model
    for prompt, stream in zip(prompts, streams, strict=True):
        out = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert out[0, len(prompt) :].tolist() == stream.tokens


def test_pages_before_the_invocation_are_the_bases(world: World) -> None:
    driver = world.driver(block_size=8)
    shared = random_prompt(random.Random(5), 40, 41)
    prompts = [shared, [*shared, *INVOCATION, 5, 6, 7, 8, 9], [*shared, *INVOCATION, 5, 6, 7, 8, 9, 4]]
    hits = []
    for prompt, name in zip(prompts, (None, "alora", "alora"), strict=True):
        before = driver.engine.stats().prefix_cache_hits
        driver.add(prompt, name)
        driver.run()
        hits.append(driver.engine.stats().prefix_cache_hits - before)
    assert hits == [0, 40, 48], "the base's five pages, then the adapter's first as well"
    driver.add([*prompts[1], 4], None)
    driver.add([*shared, *INVOCATION, 5, 6, 7, 8, 9], "alora-head")
    driver.run()
    assert driver.engine.stats().prefix_cache_hits == sum(hits) + 40 + 40, "no page of one adapter serves another"
    for stream in driver.streams.values():
        assert_alone(stream, world.oracle(stream))


def test_what_the_base_computed_after_an_adapter_is_shared_the_other_way(world: World) -> None:
    driver = world.driver(block_size=8)
    shared = random_prompt(random.Random(6), 24, 25)
    driver.add([*shared, *INVOCATION], "alora")
    driver.run()
    driver.add([*shared, 5], None)
    driver.run()
    assert driver.engine.stats().prefix_cache_hits == 24
    for stream in driver.streams.values():
        assert_alone(stream, world.oracle(stream))


def test_a_later_invocation_is_another_content() -> None:
    """A first request generated the invocation, a second one has it in its prompt: the same tokens, other pages."""
    tokens = [1, 2, 70, 3, 4, 70, 5, 6]

    def keys(block_size: int, activation: int | None) -> list[bytes]:
        base = root_key("m", None, None)
        seq = Sequence.start(EngineRequest("r", tokens, SamplingParams()), base, 9)
        if activation is not None:
            seq.activation, seq.active_root = activation, root_key("m", "alora", None)
        return seq.full_block_keys(block_size, len(tokens))

    base, early, late = (keys(2, activation) for activation in (None, 2, 5))
    assert base[0] == early[0] == late[0] and base[1] == late[1]
    assert len({*base[2:], *early[1:], *late[2:]}) == 2 + 3 + 2
    whole = [keys(8, activation) for activation in (None, 0, 2, 5, 7)]
    assert len({key for (key,) in whole}) == len(whole)


@pytest.mark.parametrize(
    ("tokens", "wanted", "start"),
    [([1, 2, 1, 2], [1, 2], 2), ([1, 1, 1], [1, 1], 1), ([1, 2], [1, 2, 3], None), ([3, 1, 2], [2, 1], None)],
)
def test_last_occurrence(tokens: list[int], wanted: list[int], start: int | None) -> None:
    assert last_occurrence(tokens, wanted) == start


@pytest.mark.parametrize(
    ("adapter", "choices", "param"),
    [
        ("poly", {}, "task_id"),
        ("poly", {"task_id": 3}, "task_id"),
        ("poly", {"task_id": -1}, "task_id"),
        ("poly", {"task_id": True}, "task_id"),
        ("poly", {"task_id": 1, "lora_rank": 2}, "lora_rank"),
        ("mpt", {}, "task_id"),
        ("mpt", {"task_id": 3}, "task_id"),
        ("dylora", {"lora_rank": 0}, "lora_rank"),
        ("dylora", {"lora_rank": RANK + 1}, "lora_rank"),
        ("dylora", {"task_id": 0}, "task_id"),
        ("lora", {"lora_rank": 2}, "lora_rank"),
        (None, {"task_id": 0}, "task_id"),
    ],
)
def test_a_choice_that_cannot_be_served(adapter: str | None, choices: dict, param: str, world: World) -> None:
    driver = world.driver()
    with pytest.raises(InvalidRequest, match=f"'{param}'") as caught:
        driver.add([5, 6], adapter, choices)
    assert caught.value.param == param
    assert not driver.engine.has_work
    driver.engine.check_integrity()


def test_unregistered_adapters_are_not_found(world: World) -> None:
    driver = world.driver()
    stream = driver.add([5, *INVOCATION], "alora")
    driver.engine.unregister_adapter("alora")
    for prompt in ([5, 6], [5, *INVOCATION]):
        with pytest.raises(NotFound):
            driver.add(prompt, "alora")
    driver.run()
    assert_alone(stream, world.oracle(stream))


def test_variants_are_forgotten(world: World) -> None:
    driver = world.driver(max_adapters=2)
    adapters = driver.engine.adapters
    for task in range(3):
        driver.add([5, 6], "mpt", {"task_id": task})
        driver.run()
        assert adapters.knows(f"mpt+task_id={task}")
    driver.engine.poll()
    assert [adapters.knows(f"mpt+task_id={task}") for task in range(3)] == [False, True, True], "two slots"
    stats = driver.engine.stats()
    assert stats.tiers.keys() == world.adapters.keys() and stats.tiers["mpt"] == "device"
    stream = driver.add([5, 6], "mpt", {"task_id": 1}, max_tokens=20)
    driver.step()
    assert driver.engine.stats().refcounts["mpt"] == 1
    driver.engine.unregister_adapter("mpt")
    with pytest.raises(NotFound):
        driver.add([5, 6], "mpt", {"task_id": 2})
    driver.run()
    assert_alone(stream, world.oracle(stream))
    driver.engine.poll()
    assert not any(adapters.knows(name) for name in ("mpt", "mpt+task_id=1", "mpt+task_id=2"))
    assert driver.engine.stats().slots_used == 0 and adapters.idle
    driver.engine.check_integrity()


def test_a_variant_nobody_waits_for_any_more(world: World) -> None:
    driver = world.driver()
    stream = driver.add([5, 6], "poly", {"task_id": 2})
    driver.engine.step()
    driver.engine.abort(stream.request.request_id)
    driver.run()
    while not driver.engine.adapters.idle:
        driver.engine.adapters.wait(0.02)
        driver.engine.poll()
    assert not driver.engine.adapters.knows("poly+task_id=2")
    driver.engine.check_integrity()


def test_the_default_choice_is_the_version_itself(world: World) -> None:
    driver = world.driver()
    for choices in ({}, {"lora_rank": RANK}):
        driver.add([5] * 40, "dylora", choices)
        driver.run()
    stats = driver.engine.stats()
    assert stats.loads == 1 and stats.prefix_cache_hits == 32


def test_a_variant_that_cannot_be_made_ends_its_requests(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = world.driver()

    def broken(*args: object) -> None:
        raise AdapterError("the file is gone")

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.models[None].variants, "compile_folder", broken)
        failed = driver.add([5, 6], "poly", {"task_id": 1})
        other = driver.add([5, 6], "lora")
        driver.run()
    assert failed.last is not None and failed.last.error == "the file is gone"
    assert_alone(other, world.oracle(other))
    again = driver.add([5, 6], "poly", {"task_id": 1})
    driver.run()
    assert_alone(again, world.oracle(again))


def test_others_decode_while_a_variant_is_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = world.driver()
    compile_folder, let_go = driver.engine.models[None].variants.compile_folder, threading.Event()

    def slow(*args: Any) -> CompiledAdapter:
        assert let_go.wait(20)
        return compile_folder(*args)

    monkeypatch.setattr(driver.engine.models[None].variants, "compile_folder", slow)
    driver.add([5, 6], "lora", max_tokens=1)
    driver.run()  # it is in its slot; the loader is free
    slow_one = driver.add([5, 6], "mpt", {"task_id": 1})
    others = [driver.add([5, 6], name) for name in ("lora", None)]
    while not all(stream.last for stream in others):
        driver.step()
    assert slow_one.last is None and driver.engine.stats().tiers["mpt"] == "loading"
    let_go.set()
    driver.run()
    assert_alone(slow_one, world.oracle(slow_one))


def test_what_is_derived_of_several_adapters(world: World) -> None:
    """The folders of all of them go in; they stay until it is gone, and it goes when one of them is to go."""
    driver = world.driver(adapter_memory=1 << 22)
    adapters, seen = driver.engine.adapters, []

    def make(folders: tuple[Path, ...]) -> CompiledAdapter:
        seen.append(folders)
        return driver.engine.models[None].variants.compile_folder(folders[0], "sum")

    sum_of_two = Derivation("sum", ("lora", "dylora"), make)
    assert not adapters.hold("none", Derivation("none", ("lora", "gone"), make)) and not adapters.knows("none")
    assert adapters.hold("sum", sum_of_two) and adapters.hold("sum", sum_of_two)
    while adapters.acquire("sum") is None:
        adapters.wait(0.02)
        assert not adapters.poll()
    assert seen == [(world.adapters["lora"], world.adapters["dylora"])]
    assert adapters.tiers()["dylora"] == "device" and adapters.holds()["lora"] == 2
    adapters.release("sum")
    adapters.drop("sum")
    adapters.unregister("dylora")
    adapters.poll()
    assert adapters.knows("dylora") and adapters.knows("sum") and not adapters.hold("sum", sum_of_two)
    adapters.drop("sum")
    adapters.poll()
    assert not adapters.knows("dylora") and not adapters.knows("sum") and adapters.knows("lora")
    assert adapters.pool.slots_used == 0
    adapters.check_integrity()


def test_what_is_derived_may_be_too_large(world: World) -> None:
    adapters = world.driver(adapter_memory=1 << 22).engine.adapters

    def make(folders: tuple[Path, ...]) -> CompiledAdapter:
        rows = torch.zeros(20_000, 64)
        return CompiledAdapter("big", "SUM", {"model.layers.0.self_attn.q_proj": SiteForms(LowRank(rows, rows.T))})

    assert adapters.hold("big", Derivation("big", ("lora",), make))
    assert adapters.acquire("big") is None
    failed: list[tuple[str, AdapterError]] = []
    while not failed:
        adapters.wait(0.02)
        failed = adapters.poll()
    ((version, error),) = failed
    assert version == "big" and isinstance(error, AdapterTooLarge)
    adapters.drop("big")
    adapters.poll()
    assert not adapters.knows("big") and adapters.idle


def test_what_is_nothing_without_a_choice_cannot_be_pinned(world: World) -> None:
    driver = world.driver()
    driver.engine.pin_adapters(["dylora"])
    with pytest.raises(AdapterUnsupported, match="task_id"):
        driver.engine.pin_adapters(["dylora", "poly"])


def test_adapters_say_what_they_let_requests_choose(world: World) -> None:
    engine = world.driver().engine
    infos = {name: engine.register_adapter(name, folder) for name, folder in world.adapters.items()}
    choices = {name: [(c.name, c.low, c.high, c.default) for c in info.choices] for name, info in infos.items()}
    assert choices == {
        "poly": [("task_id", 0, 2, None)],
        "mpt": [("task_id", 0, 2, None)],
        "dylora": [("lora_rank", 1, RANK, RANK)],
        "alora": [],
        "alora-head": [],
        "lora": [],
    }
    assert infos["alora"].invocation == tuple(INVOCATION) and infos["lora"].invocation == ()


def test_offline(world: World) -> None:
    llm = LLM(str(world.base), world.adapters, dtype="float32")
    names = ["poly", "dylora", None, "mpt", "poly"]
    tasks, ranks = [2, None, None, 0, 1], [None, 3, None, None, None]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7]] * 5, params, adapter=names, task_id=tasks, lora_rank=ranks)
    for output, name, task, rank in zip(outputs, names, tasks, ranks, strict=True):
        chosen = {key: value for key, value in (("task_id", task), ("lora_rank", rank)) if value is not None}
        request = EngineRequest("r", [5, 6, 7], params, adapter=name, choices=chosen)
        assert output.outputs[0].token_ids == world.oracle(Stream(request)).generate([5, 6, 7], 6).tokens
    with pytest.raises(InvalidRequest, match="'task_id'"):
        llm.generate([[5, 6]], params, adapter="poly")
