"""Decode steps on static, padded buffers, as captured graphs run them: the same answers, whatever the mixture.

There is no GPU here: in place of a graph the same function runs on the same buffers each time, by the same kernels,
under Triton's interpreter. What a graph could not hold, asking the device for a value, is looked for by its operators.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.conftest import Zoo
from tests.engine.harness import assert_alone, random_prompt
from weft.kernels import dispatch
from weft.server.engine import startup
from weft.server.engine.graphs import Step, ladder

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "item", "unique_dim", "_unique2", "equal", "is_nonzero"}


class NoQuestions(TorchDispatchMode):
    """A step that asks the device for a value cannot be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ASKS, f"a captured step asks the device: {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def by_triton() -> Iterator[None]:
    """Every op by its Triton kernel, which reads nothing but what lies in the buffers."""
    modules = [m for m in sys.modules.values() if getattr(m, "backend", None) is dispatch.backend]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "backend", lambda tensor: "triton")
        yield


class Recorder:
    """Stands in for capture; counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1
        with by_triton():
            step()  # makes the plans that a step shares, as the runs before a capture do

        def replay() -> None:
            self.replayed += 1
            with by_triton(), NoQuestions():
                step()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(startup, "capture_for", lambda device: made)
    return made


def check_mixed(zoo: Zoo, recorder: Recorder, adapters: list[str], rows: int) -> None:
    """Rows come and go, so that the same graphs run with other rows, ranks and adapters, and filled up otherwise."""
    driver = zoo.driver(max_num_batched_tokens=48, block_size=4, max_num_seqs=rows)
    rng = random.Random(0)
    for index, adapter in enumerate([*adapters, None]):
        driver.add(random_prompt(rng, 3, 20), adapter, max_tokens=3 + index % 2)
    driver.run()
    assert recorder.replayed > recorder.recorded > 1, "the same graph serves several mixtures"
    for stream in driver.streams.values():
        assert_alone(stream, zoo.oracles[stream.request.adapter])


class Apart:
    """Stands in for a second stream; counts what began beside a product and was waited for."""

    def __init__(self) -> None:
        self.forked = 0
        self.joined = 0

    def pays(self, rows: int) -> bool:
        return True

    @contextmanager
    def fork(self) -> Iterator[None]:
        self.forked += 1
        yield

    def join(self) -> None:
        self.joined += 1
        assert self.joined == self.forked, "nothing else began meanwhile"


def test_updates_that_begin_beside_products_equal_each_adapter_alone(
    llama: Zoo, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Apart()
    monkeypatch.setattr(startup, "overlap_for", lambda device: apart)
    check_mixed(llama, recorder, ["rslora", "lora-bias"], rows=2)
    assert apart.joined == apart.forked > 0


def test_padded_steps_of_a_mixed_batch_equal_each_adapter_alone(llama: Zoo, recorder: Recorder) -> None:
    check_mixed(llama, recorder, ["lora-bias", "head"], rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3"])
def test_every_variant_of_lora_is_captured(arch: str, zoo_of: Callable[[str], Zoo], recorder: Recorder) -> None:
    zoo = zoo_of(arch)
    check_mixed(zoo, recorder, list(zoo.adapters), rows=5)


def test_a_graph_outlives_a_change_of_adapters(llama: Zoo, recorder: Recorder) -> None:
    """One on the same linears and of no larger rank needs no graph of its own, and the base needs one in all."""
    driver = llama.driver(max_num_batched_tokens=64, block_size=4, max_num_seqs=2)
    for name, recorded in ((None, 1), ("rslora", 2), ("patterns", 2), (None, 2), ("rslora", 2)):
        driver.add(list(range(3, 9)), name, max_tokens=2)
        driver.run()
        assert recorder.recorded == recorded
    assert recorder.replayed == 5
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


def test_the_ladder_fills_up_little() -> None:
    for most in (1, 3, 8, 64, 100, 256):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for rows in range(1, most + 1):
            filled = next(size for size in sizes if size >= rows)
            assert filled <= max(2 * rows, 8) and (rows < 64 or filled <= rows * 9 / 8 + 1)


def test_it_can_be_switched_off(llama: Zoo, recorder: Recorder) -> None:
    driver = llama.driver(cuda_graphs=False)
    driver.add(list(range(3, 9)), max_tokens=3)
    driver.run()
    assert recorder.recorded == 0
