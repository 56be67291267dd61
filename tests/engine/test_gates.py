"""Gates that are means over a prompt, beside rows of every other kind: as the library answers with a KV cache."""

from __future__ import annotations

import random

import pytest
from peft import LilyConfig

from tests.adapters.cases.lily import CASES
from tests.engine.conftest import Zoo
from tests.engine.harness import Oracles, assert_alone, random_prompt
from tests.support.adapters import make_adapter, make_lora
from tests.support.models import tiny_model
from weft.server import LLM, SamplingParams
from weft.server.errors import InvalidRequest

LINEARS = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen3": ["k_proj", "up_proj"], "mixtral": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module", params=LINEARS)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    arch: str = request.param
    folder = tmp_path_factory.mktemp(f"gates-{arch}")
    base = tiny_model(arch, folder / "base")
    configs = (
        CASES
        if arch == "llama"
        else {
            name: LilyConfig(
                task_type="CAUSAL_LM", r=3, num_B=count, stride_A=2, scaling=8.0, target_modules=LINEARS[arch]
            )
            for name, count in (("lily", 2), ("lily_many", 20))
        }
    )
    adapters = {name: make_adapter(base, folder / name, config) for name, config in configs.items()}
    adapters["lora"] = make_lora(base, folder / "lora", target_modules=["q_proj"])
    return Zoo(base, adapters, Oracles(base, adapters))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 46, "block_size": 4},
        {"max_adapters": 2},
        {"max_num_batched_tokens": 60, "kv_cache_memory": 1 << 18, "block_size": 4},
    ],
    ids=["whole", "chunked", "two slots", "preempted"],
)
def test_mixed_rows_equal_peft_alone(settings: dict, zoo: Zoo) -> None:
    driver = zoo.driver(max_num_seqs=16, **settings)
    rng = random.Random(0)
    names = [*zoo.adapters, None]
    for index in range(14):
        driver.add(
            random_prompt(rng), names[index % len(names)], max_tokens=20, prompt_logprobs=0 if index % 3 == 0 else None
        )
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    assert bool(driver.engine.stats().preemptions) == ("kv_cache_memory" in settings)
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


def test_a_prompt_comes_through_beside_steady_decoding(zoo: Zoo) -> None:
    driver = zoo.driver(max_num_seqs=9, max_num_batched_tokens=44)
    rng = random.Random(1)
    for _ in range(8):
        driver.add(random_prompt(rng, 5, 9), rng.choice([None, "lora"]), max_tokens=60)
    for _ in range(20):
        driver.step()
    stream = driver.add(random_prompt(rng, 44, 45), "lily", max_tokens=5)
    while not stream.tokens:
        driver.step()
        assert all(other.last is None for other in driver.streams.values()), "it waited for the others to end"
    driver.run()
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


def test_a_prompt_that_no_step_has_room_for_is_refused(zoo: Zoo) -> None:
    driver = zoo.driver(max_num_batched_tokens=20)
    with pytest.raises(
        InvalidRequest, match="in one pass, of at most 20 tokens: raise --max-num-batched-tokens"
    ) as error:
        driver.add([5] * 21, "lily")
    assert error.value.param == "prompt"
    driver.add([5] * 20, "lily")
    driver.add([5] * 40, "lora")
    driver.run()


def test_no_page_is_used_again(zoo: Zoo) -> None:
    prompt = [7, 9, 11, 13] * 10
    driver = zoo.driver(block_size=4)
    streams = [driver.add(prompt, "lily") for _ in range(2)]
    driver.run()
    streams.append(driver.add(prompt, "lily"))
    driver.run()
    for stream in streams:
        assert_alone(stream, zoo.oracles["lily"])
    assert driver.engine.stats().prefix_cache_hits == 0


def test_several_answers_to_a_prompt(zoo: Zoo) -> None:
    llm = LLM(str(zoo.base), {"lily": zoo.adapters["lily"]}, dtype="float32", max_num_batched_tokens=40)
    prompt = [7, 9, 11, 13] * 8
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    alone = zoo.oracles["lily"].generate(prompt, 6).tokens
    (output,) = llm.generate([prompt], params, adapter="lily", n=3)
    assert [completion.token_ids for completion in output.outputs] == [alone] * 3
