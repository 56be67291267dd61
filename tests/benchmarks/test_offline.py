"""The offline load generator on a tiny model: everything asked for is generated, and the figures fit together."""

from collections.abc import Iterator

import pytest

from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.server.bench.offline import OfflineTarget
from weft.server.bench.run import measure
from weft.server.bench.workload import Workload
from weft.server.config import EngineConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineTarget]:
    home = tmp_path_factory.mktemp("offline")
    base = tiny_model("llama", home / "base")
    adapters = {
        name: make_lora(base, home / name, seed=seed, r=4, target_modules=["q_proj"]) for seed, name in enumerate("abc")
    }
    target = OfflineTarget(EngineConfig(str(base), device="cpu", max_num_seqs=8), adapters)
    yield target
    target.engine.check_integrity()
    target.close()


WORKLOAD = Workload(
    num_requests=12, popularity="distinct", prompt_tokens=(4, 40), output_tokens=(3, 12), vocab_size=100
)


@pytest.mark.parametrize("rate", [None, 200.0])
def test_everything_asked_for_is_generated(target: OfflineTarget, rate: float | None) -> None:
    workload = Workload(**{**vars(WORKLOAD), "rate": rate, "concurrency": 6})
    models = [*target.adapters, target.base]
    run = measure(target, workload, models)
    figures = run["results"]
    asked = workload.sample(models)
    assert (figures["completed"], figures["errors"]) == (12, 0)
    assert figures["prompt_tokens"] == sum(len(arrival.prompt) for arrival in asked)
    expected = {model: sum(a.max_tokens for a in asked if a.model == model) for model in models}
    assert figures["output_tokens_by_model"] == expected
    assert 1 <= figures["adapters_per_step_mean"] <= 3
    assert figures["adapters_per_step_max"] == 3
    assert 0 < figures["ttft_ms"]["p50"] <= figures["latency_ms"]["p99"]
    assert run["target"]["architecture"] == "LlamaForCausalLM"


def test_a_closed_loop_keeps_its_concurrency(target: OfflineTarget) -> None:
    running = []
    step = target.engine.step
    target.engine.step = lambda: (running.append(target.engine.stats()), step())[1]  # type: ignore[method-assign]
    try:
        measure(target, Workload(**{**vars(WORKLOAD), "concurrency": 2}), target.adapters)
    finally:
        del target.engine.step
    assert max(stats.running + stats.waiting for stats in running) == 2


def test_the_base_alone_has_no_adapters_in_its_steps(target: OfflineTarget) -> None:
    assert measure(target, WORKLOAD, [target.base])["results"]["adapters_per_step_max"] == 0


def test_refused_requests_are_counted_with_their_reason(target: OfflineTarget) -> None:
    workload = Workload(num_requests=3, prompt_tokens=(600, 600), output_tokens=(2, 2), vocab_size=100)
    figures = measure(target, workload, ["a"])["results"]
    assert (figures["completed"], figures["errors"]) == (0, 3)
    assert "600 tokens" in figures["error_messages"][0]
