"""Scheduling decisions, without a model."""

from __future__ import annotations

from typing import Any

from weft.server.config import EngineConfig
from weft.server.engine.blocks import BlockPool, root_key
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.scheduler import Row, Scheduler
from weft.server.engine.sequence import Sequence


class AllResident:
    """Every adapter is on the device, in a slot of its own."""

    def __init__(self) -> None:
        self.pins: dict[str, int] = {}
        self.absent: set[str] = set()

    def acquire(self, version: str, *, urgent: bool = False) -> int | None:
        if version in self.absent:
            return None
        self.pins[version] = self.pins.get(version, 0) + 1
        return int(version)

    def release(self, version: str, *, used: bool = True) -> None:
        self.pins[version] -= 1

    def prompt(self, version: str) -> None:
        return None


class Bench:
    """A scheduler and the part of the engine that commits its steps; every row samples token 5."""

    def __init__(self, num_blocks: int = 1000, **config: Any) -> None:
        settings = EngineConfig("none", **{"block_size": 4, "max_num_batched_tokens": 64, **config})
        self.slots = AllResident()
        self.scheduler = Scheduler(settings, [(BlockPool(num_blocks), self.slots)])
        self.served: list[str] = []
        self._serial = 0

    def add(self, adapter: str | None, prompt: int = 8, output: int = 8, priority: int = 0) -> Sequence:
        self._serial += 1
        tokens = [self._serial] * prompt
        params = SamplingParams(max_tokens=output)
        request = EngineRequest(str(self._serial), tokens, params, adapter, adapter, priority=priority)
        seq = Sequence.start(request, root_key("m", adapter, None), prompt + output)
        self.scheduler.add(seq)
        return seq

    def step(self) -> list[Row]:
        rows = self.scheduler.schedule()
        assert sum(row.stop - row.start for row in rows) <= self.scheduler.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        for row in rows:
            assert len(row.seq.blocks) * 4 >= row.stop, "a row without the pages it writes to"
            if row.start == 0:
                self.served.append(row.seq.name)
            samples = row.samples
            self.scheduler.computed(row)
            if samples:
                row.seq.tokens.append(5)
                if len(row.seq.tokens) == row.seq.max_len:
                    self.scheduler.finish(row.seq)
        self.scheduler.check_integrity(lambda version: self.slots.pins.get(version, 0))
        return rows

    def run(self) -> int:
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps += 1
            assert steps < 10_000, "no progress"
        return steps


def test_decoding_rows_come_first_and_prefill_fills_the_rest() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add(None, prompt=4, output=8)
    bench.step()
    bench.add(None, prompt=40, output=2)
    lens = [[row.stop - row.start for row in bench.step()] for _ in range(3)]
    assert lens == [[1, 15], [1, 15], [1, 10]]


def test_a_flood_on_one_adapter_does_not_starve_another() -> None:
    bench = Bench(max_num_seqs=2)
    for _ in range(20):
        bench.add("1")
    bench.step()
    bench.add("2")
    bench.add("2")
    bench.run()
    assert set(bench.served[2:5]) == {"1", "2"}, "the newcomer is served with the next free rows"
    assert bench.served.index("2") <= 3


def test_service_is_shared_by_tokens_not_by_requests() -> None:
    bench = Bench(max_num_seqs=1)
    for _ in range(8):
        bench.add("1", prompt=40, output=1)
        bench.add("2", prompt=10, output=1)
    bench.run()
    first_half = bench.served[:10]
    assert first_half.count("2") == 8, "four requests of 10 tokens weigh as much as one of 40"


def test_an_idle_adapter_banks_no_credit() -> None:
    bench = Bench(max_num_seqs=1)
    for _ in range(10):
        bench.add("1")
    for _ in range(40):
        bench.step()
    for _ in range(10):
        bench.add("2")
    start = len(bench.served)
    bench.run()
    assert bench.served[start : start + 6].count("1") >= 2


def test_priority_goes_before_fairness() -> None:
    bench = Bench(max_num_seqs=1)
    for _ in range(3):
        bench.add("1")
    bench.add("1", priority=-1)
    bench.add("2", priority=-2)
    first = bench.step()[0].seq
    assert (first.name, first.request.priority) == ("2", -2)
    bench.run()
    assert bench.served == ["2", "1", "1", "1", "1"]


def test_an_absent_adapter_waits_alone() -> None:
    bench = Bench()
    bench.slots.absent.add("1")
    waiting = bench.add("1")
    bench.add("2")
    bench.add(None)
    for _ in range(20):
        bench.step()
    assert list(bench.scheduler.waiting) == [waiting]
    bench.slots.absent.clear()
    bench.run()
    assert bench.served == ["2", "", "1"]


def test_preemption_takes_the_youngest_and_all_finish() -> None:
    bench = Bench(num_blocks=12)
    seqs = [bench.add(None, prompt=8, output=20) for _ in range(6)]
    bench.run()
    assert bench.scheduler.preemptions > 0
    assert all(len(seq.tokens) == 28 for seq in seqs)
    assert seqs[0].computed == 0 and bench.scheduler.lanes[0].blocks.num_free == 12


def test_one_row_that_needs_every_page_finishes() -> None:
    bench = Bench(num_blocks=7)
    seq = bench.add(None, prompt=8, output=20)
    other = bench.add(None, prompt=8, output=20)
    bench.run()
    assert len(seq.tokens) == len(other.tokens) == 28


def test_a_repeated_prompt_computes_only_what_is_new() -> None:
    bench = Bench()
    first = bench.add(None, prompt=17, output=1)
    bench.run()
    again = Sequence.start(first.request, first.root, 18)
    bench.scheduler.add(again)
    (row,) = bench.step()
    assert (row.start, row.stop) == (16, 17)


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    bench = Bench()
    first = bench.add(None, prompt=16, output=1)
    bench.run()
    again = Sequence.start(first.request, first.root, 17)
    bench.scheduler.add(again)
    (row,) = bench.step()
    assert (row.start, row.stop) == (12, 16)
