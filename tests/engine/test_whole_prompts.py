"""Prompts that must be computed in one pass: scheduling decisions, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_scheduler import Bench
from weft.server.engine.scheduler import Row
from weft.server.engine.sequence import Sequence


class Whole(Bench):
    """Requests of adapter 1 have prompts that are computed whole, in no other way."""

    def add(self, adapter: str | None, *args: Any, **fields: Any) -> Sequence:
        seq = super().add(adapter, *args, **fields)
        seq.whole_prompt = adapter == "1"
        return seq

    def step(self) -> list[Row]:
        rows = super().step()
        for row in rows:
            if row.seq.whole_prompt:
                assert sum(row.seq.spans(row.start, row.stop)) == row.stop - row.start  # raises where a prompt is cut
        return rows


def test_a_prompt_waits_for_a_step_with_room_for_all_of_it() -> None:
    bench = Whole(max_num_batched_tokens=16)
    bench.add(None, prompt=10, output=1)
    seq = bench.add("1", prompt=12, output=3)
    assert [row.stop - row.start for row in bench.step()] == [10]
    assert [(row.seq, row.start, row.stop) for row in bench.step()] == [(seq, 0, 12)]
    bench.run()


@pytest.mark.parametrize("size", [10, 16])
def test_steady_decoding_does_not_starve_it(size: int) -> None:
    """Seven rows decode whenever they can; a prompt of ``size`` never finds its budget beside them."""
    bench = Whole(max_num_batched_tokens=16, max_num_seqs=8)
    others = [bench.add(None, prompt=1, output=60) for _ in range(7)]
    bench.step()
    seq = bench.add("1", prompt=size, output=2)
    steps = 0
    while not seq.output_len:
        before = [len(other.tokens) for other in others]
        bench.step()
        steps += 1
        progress = [len(other.tokens) - old for other, old in zip(others, before, strict=True)]
        assert steps <= 2 and (all(progress) or seq.output_len), "only the step that computes the prompt pauses them"
    bench.run()


def test_a_flood_of_them_does_not_starve_decoding() -> None:
    bench = Whole(max_num_batched_tokens=16, max_num_seqs=8)
    other = bench.add(None, prompt=1, output=30)
    bench.step()
    for _ in range(40):
        bench.add("1", prompt=16, output=1)
    pauses = [0]
    while other in bench.scheduler.running:
        before = len(other.tokens)
        bench.step()
        pauses.append(pauses[-1] + 1 if len(other.tokens) == before else 0)
    assert max(pauses) == 1, "every other step is for decoding first"
    bench.run()


def test_what_was_reserved_is_given_to_no_one_else() -> None:
    bench = Whole(max_num_batched_tokens=16, max_num_seqs=8)
    bench.add(None, prompt=1, output=60)
    bench.step()
    seq = bench.add("1", prompt=16, output=1)
    bench.step()
    for _ in range(20):
        bench.add("2", prompt=4, output=1, priority=-1)
    assert [row.seq for row in bench.step()] == [seq]
    bench.run()


def test_a_reservation_ends_with_its_request() -> None:
    bench = Whole(max_num_batched_tokens=16)
    other = bench.add(None, prompt=1, output=60)
    bench.step()
    seq = bench.add("1", prompt=16, output=1)
    bench.step()
    bench.scheduler.finish(seq)
    bench.add("2", prompt=15, output=1)
    assert [row.stop - row.start for row in bench.step()] == [1, 15]
    assert len(other.tokens) == 4


def test_recomputed_it_is_whole_again_and_what_was_generated_may_be_cut() -> None:
    bench = Whole(num_blocks=14, max_num_batched_tokens=12, max_num_seqs=4)
    seqs = [bench.add("1", prompt=8, output=20) for _ in range(4)]
    rows: list[Row] = []
    while bench.scheduler.running or bench.scheduler.waiting:
        rows += bench.step()
    assert bench.scheduler.preemptions
    again = [row for row in rows if row.start == 0 and row.stop > 8]
    assert again, "some row was recomputed past its prompt"
    assert any(row.start > 8 and row.stop - row.start > 1 for row in rows), "and then further"
    assert all(len(seq.tokens) == 28 for seq in seqs)


def test_its_pages_are_nobody_elses() -> None:
    bench = Whole()
    for _ in range(2):
        seq = bench.add("1", prompt=32, output=8)
        seq.request.prompt_token_ids[:] = seq.tokens[:] = [7] * 32
        bench.run()
        assert seq.cached_tokens == 0 and not seq.keys
    assert bench.scheduler.cache_hits == 0
