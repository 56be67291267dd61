"""The page pool under any order of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft.server.engine.blocks import BlockPool, block_key, root_key

NUM_BLOCKS = 12


class BlockPoolMachine(RuleBasedStateMachine):
    """Rows take, share, publish and give back pages; a model tracks what every key's page must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.rows: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # page -> what was published in it since it was handed out

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count
            assert not {b for row in self.rows for b in row} & set(blocks), "a page in use was handed out"
            for block in blocks:
                self.content.pop(block, None)
            self.rows.append(blocks)

    @precondition(lambda self: any(self.rows))
    @rule(data=st.data(), word=st.integers(0, 6))
    def publish(self, data: st.DataObject, word: int) -> None:
        row = data.draw(st.sampled_from([row for row in self.rows if row]))
        block = data.draw(st.sampled_from(row))
        key = block_key(b"root", [word])
        if block not in self.content:
            self.pool.publish(block, key)
            self.content[block] = key

    @rule(word=st.integers(0, 6))
    def find_and_share(self, word: int) -> None:
        key = block_key(b"root", [word])
        found = self.pool.lookup([key])
        for block in found:
            assert self.content[block] == key, "a page was found under content it does not hold"
        if found:
            self.pool.share(found)
            self.rows.append(found)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.pool.release(row)

    @invariant()
    def integrity(self) -> None:
        self.pool.check_integrity(self.rows)
        held = {b for row in self.rows for b in row}
        assert self.pool.num_free == NUM_BLOCKS - len(held)


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_cached_pages_survive_until_they_are_needed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    keys = [block_key(root_key("m", None, None), [1]), b"second"]
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.lookup(keys) == blocks
    assert pool.allocate(1) == [2], "a page without content goes first"
    assert pool.allocate(1) == [blocks[1]], "then the tail of the prefix"
    assert pool.lookup(keys) == blocks[:1]


def test_integrity_check_sees_a_lost_reference() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="disagree"):
        pool.check_integrity([])
    assert blocks is not None
    pool.check_integrity([blocks])
