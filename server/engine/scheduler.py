"""Decides what runs in the next step: continuous batching, chunked prefill, prefix cache, preemption, fairness."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from weft.adapters.forms import Prompt
from weft.server.config import EngineConfig
from weft.server.engine.blocks import BlockPool
from weft.server.engine.prompts import PromptPages
from weft.server.engine.queues import FairQueues
from weft.server.engine.sequence import Sequence


class Slots(Protocol):
    """Where adapters live on the device, as far as scheduling is concerned."""

    def acquire(self, version: str, *, urgent: bool = False) -> int | None:
        """Pin the adapter's slot and return it, or None while it is not on the device (a load is then under way).

        Args:
            urgent: it is for the first in line, to whom adapters make room that nobody uses but others wait for.
        """

    def release(self, version: str, *, used: bool = True) -> None:
        """Give back one pin; of an adapter that is still waited for, if it was not ``used``."""

    def prompt(self, version: str) -> Prompt | None:
        """What an adapter that is on the device puts in front of every prompt."""

    def knows(self, version: str) -> bool:
        """Whether the version is registered, or still held by a live request."""


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step: its tokens ``[start, stop)``.

    The logits of the last token are sampled from when ``stop`` reaches the end of what is known.
    """

    seq: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.seq.tokens) and self.seq.embeddings is None


@dataclass
class Lane:
    """What the rows of one model share.

    Attributes:
        rows: that are running.
    """

    blocks: BlockPool
    slots: Slots
    prompts: PromptPages
    rows: int = 0


class Scheduler:
    """Queues, running rows and their pages.

    Invariants: a sequence is waiting or running, never both; a waiting one holds no pages and no slot pin; running
    ones are in the order of their admission, so the last one is the first to be preempted.

    The streams of a request are admitted, preempted and ended together, in all lanes, so requests cannot wait for each
    other in a circle. A waiting one holds nothing, and the first in line takes precedence over all that wait: what was
    loaded for others makes room for it, not the other way round. A running one lacks nothing but pages, which it takes
    from the youngest that has some in that lane. The oldest is never preempted for another, and it fits into empty
    lanes, which the engine checks. So the oldest ends, and after it the next.

    Args:
        lanes: pages and slots of every model, the main one first. Each lane has ``max_num_seqs`` rows and
            ``max_num_batched_tokens`` tokens in a step.
    """

    def __init__(self, config: EngineConfig, lanes: Iterable[tuple[BlockPool, Slots]]) -> None:
        self.config = config
        self.lanes = [
            Lane(blocks, slots, PromptPages(blocks, config.block_size, index))
            for index, (blocks, slots) in enumerate(lanes)
        ]
        self.waiting = FairQueues()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.cache_queries = 0
        self.cache_hits = 0
        self._arrivals = 0
        self._held: Sequence | None = None

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        seq.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.push(seq)

    def schedule(self) -> list[Row]:
        """The rows of the next step of every lane, decoding ones first. Their pages are allocated.

        A request whose prompts are computed whole or go abreast and that found too little budget left has what it takes
        reserved in the next step, in which decoding rows may have to pause; never in two steps in a row.
        """
        held, self._held = self._held, None
        if held is not None and held.final:
            held = None
        reserved = [_reserved(held, index) if held else 0 for index in range(len(self.lanes))]
        budget = [self.config.max_num_batched_tokens - tokens for tokens in reserved]
        preemptions = self.preemptions
        parts = [part for seq in self.running if seq is not held and not seq.final for part in seq.parts]
        rows = self._extend([part for part in parts if part[0].remaining == 1], budget)
        if held in self.running:
            budget, reserved = _added(budget, reserved), [0] * len(self.lanes)
            rows += self._extend([held.abreast], budget)
        makers = [[maker] for lane in self.lanes for maker in lane.prompts.makers()]
        rows += self._extend([*makers, *(part for part in parts if part[0].remaining > 1)], budget)
        # Whoever was preempted for the sake of another must not run.
        rows = [row for row in rows if row.seq.blocks]
        if held is None:
            ran = {row.seq for row in rows}
            self._held = next((seq for seq in self.running if seq.abreast and seq not in ran and not seq.final), None)
        if self.preemptions == preemptions:  # pages are short otherwise, and admitting would preempt again
            rows += self._admit(_added(budget, reserved), held)
        for row in rows:
            if row.seq.embeddings is None:
                self.waiting.charge(row.seq.owner.name, row.stop - row.start)
        return rows

    @property
    def roomy(self) -> bool:
        """Whether there are pages for the next step of all running rows, so that ``schedule`` preempts none."""
        lanes = [(index, lane.rows, lane.blocks.num_free) for index, lane in enumerate(self.lanes)]
        return all(rows <= free or self._lacking(index) <= free for index, rows, free in lanes)

    def _lacking(self, lane: int) -> int:
        """Pages that a lane's running rows lack: one for its newest token at most, as the rest came with admission."""
        streams = (stream for seq in self.running if not seq.final for stream in seq.streams if stream.lane == lane)
        return sum(stream.pages(self.config.block_size, len(stream.tokens)) > len(stream.blocks) for stream in streams)

    def _extend(self, parts: Iterable[list[Sequence]], budget: list[int]) -> list[Row]:
        """Rows for running sequences, oldest first, preempting the youngest when pages run out.

        Args:
            parts: sequences that advance together, or one alone.
            budget: tokens that each lane has left; what the rows take is taken off.
        """
        rows: list[Row] = []
        for part in parts:
            count = _share(part, budget)
            if count == 0 or not part[0].blocks:  # no budget left, or preempted for an older one
                continue
            if all(self._make_room(seq, seq.computed + count) for seq in part):
                rows += _advance(part, count, budget)
        return rows

    def _make_room(self, seq: Sequence, tokens: int) -> bool:
        """Pages for ``tokens`` tokens, of the youngest if need be; False if that is the request itself."""
        while not self._reserve(seq, tokens):
            victim = next(other for other in reversed(self.running) if self._rows_of(other, seq.lane))
            self.preempt(victim)
            if victim is seq.owner:
                return False
        return True

    def _admit(self, budget: list[int], held: Sequence | None) -> list[Row]:
        """Rows for waiting sequences, ``held`` first, while there are budget, rows, pages and slots.

        Args:
            held: that something was reserved for in this step, waiting or running.
        """
        rows: list[Row] = []
        first = held if held not in self.running else None
        while budget[0] > 0 and self.lanes[0].rows < self.config.max_num_seqs:
            seq = self._next(first)
            if seq is None:
                break
            cached = self._cached_blocks(seq)
            while (short := self._short_of_pages(seq, cached)) and any(lane.prompts.evict() for lane in short):
                cached = self._cached_blocks(seq)
            room = not short and not self._short_of_rows(seq)
            if room and any(_whole_tokens(seq, index) > left for index, left in enumerate(budget)):
                room, self._held = False, None if held else self._held or seq
            if not room:
                self._release_slots(seq, used=False)
                break
            first = None
            self.waiting.remove(seq)
            self.running.append(seq)
            for stream, blocks in zip(seq.streams, cached, strict=True):
                self.lanes[stream.lane].rows += 1
                self._reuse(stream, blocks)
            rows += self._begin(seq, budget)
        return rows

    def _begin(self, seq: Sequence, budget: list[int]) -> list[Row]:
        """The first rows of a request's streams; a follower gets none yet where its lane has no budget left."""
        for stream in seq.streams:
            # The whole prompt at once, though it may be computed in chunks: whoever is admitted can be computed.
            reserved = self._reserve(stream, len(stream.tokens))
            assert reserved, "admission checked that the pages are there"
        # Prompts that cannot be cut come first, so that the others do not take what they need.
        parts = sorted(seq.parts, key=lambda part: not part[0].uncut)
        return [row for part in parts for row in _advance(part, _share(part, budget), budget)]

    def _next(self, only: Sequence | None) -> Sequence | None:
        """The request to admit next, with slots for all its streams; no one but ``only``, if it is given.

        The first in line is served urgently.
        """
        looked_at: list[Sequence] = []

        def acquire(seq: Sequence) -> bool:
            if only not in (None, seq):
                return False
            looked_at.append(seq)
            # All of them, also after one that is not there: what is missing gets under way.
            acquired = [self._acquire_slot(stream, urgent=len(looked_at) == 1) for stream in seq.streams]
            if not all(acquired):
                self._release_slots(seq, used=False)
            return all(acquired)

        return self.waiting.next(acquire)

    def _acquire_slot(self, seq: Sequence, *, urgent: bool) -> bool:
        version, lane = seq.adapter, self.lanes[seq.lane]
        if version is not None:
            slot = lane.slots.acquire(version, urgent=urgent)
            if slot is None:
                return False
            seq.prompt = lane.slots.prompt(version)
            if seq.prompt is not None:
                blocks = lane.prompts.acquire(version, seq.prompt, urgent=urgent)
                if blocks is None:
                    lane.slots.release(version, used=False)
                    return False
                seq.prompt_blocks = blocks
            seq.slot = slot
        return True

    def _release_slots(self, seq: Sequence, *, used: bool) -> None:
        """Of all streams of a request that have one."""
        for stream in seq.streams:
            if stream.adapter is not None and stream.slot >= 0:
                lane = self.lanes[stream.lane]
                lane.slots.release(stream.adapter, used=used)
                if stream.prompt is not None:
                    lane.prompts.release(stream.adapter)
            stream.slot = -1
            stream.prompt_blocks = []

    def _rows_of(self, seq: Sequence, lane: int) -> int:
        """Streams of a request that run in a lane."""
        return sum(stream.lane == lane for stream in seq.streams)

    def _short_of_rows(self, seq: Sequence) -> bool:
        """Whether some lane has too many rows already."""
        limit = self.config.max_num_seqs
        return any(self._rows_of(seq, i) + self.lanes[i].rows > limit for i in {stream.lane for stream in seq.streams})

    def _cached_blocks(self, seq: Sequence) -> list[list[int]]:
        """Of each stream, pages already computed for a prefix of its tokens; at least one token is left to compute."""
        if not self.config.enable_prefix_caching or seq.scored:
            return [[] for _ in seq.streams]
        return [
            []
            if stream.whole_prompt
            else self.lanes[stream.lane].blocks.lookup(
                stream.full_block_keys(self.config.block_size, len(stream.tokens) - 1)
            )
            for stream in seq.streams
        ]

    def _short_of_pages(self, seq: Sequence, cached: list[list[int]]) -> list[Lane]:
        """Lanes where all known tokens and one more do not fit; a watermark against admitting only to preempt again."""
        short = []
        size = self.config.block_size
        for index in {stream.lane for stream in seq.streams}:
            lane, needed, taken = self.lanes[index], 0, set[int]()
            for stream, found in zip(seq.streams, cached, strict=True):
                if stream.lane == index:
                    needed += stream.pages(size, len(stream.tokens) + 1) - stream.offset // size - len(found)
                    taken.update(block for block in found if lane.blocks.is_free(block))
            # Every running row may need a page in this very step.
            if needed + lane.rows > lane.blocks.num_free - len(taken):
                short.append(lane)
        return short

    def _reuse(self, seq: Sequence, cached: list[int]) -> None:
        """Begin with the pages that are there: of the adapter's prompt, then of a cached prefix of the tokens."""
        size = self.config.block_size
        shared = seq.prompt_blocks[: seq.offset // size]
        self.lanes[seq.lane].blocks.share(shared + cached)
        seq.blocks = shared + cached
        seq.published = len(cached)
        seq.computed = len(seq.blocks) * size - seq.offset if cached else 0
        if seq.first_run is None:
            seq.first_run = time.monotonic()
            seq.cached_tokens = seq.computed
            self.cache_queries += seq.prompt_len
            self.cache_hits += seq.computed

    def _reserve(self, seq: Sequence, tokens: int) -> bool:
        """Give ``seq`` the pages for ``tokens`` tokens; False when there are not enough."""
        missing = seq.pages(self.config.block_size, tokens) - len(seq.blocks)
        if missing <= 0:
            return True
        lane = self.lanes[seq.lane]
        blocks = lane.blocks.allocate(missing)
        while blocks is None and lane.prompts.evict():
            blocks = lane.blocks.allocate(missing)
        if blocks is None:
            return False
        shared, tail = divmod(seq.offset, self.config.block_size)
        if tail and len(seq.blocks) == shared:
            seq.copy = (seq.prompt_blocks[shared], blocks[0])
        seq.blocks += blocks
        return True

    def computed(self, row: Row) -> None:
        """The row's step was launched: for all steps after it, the row's keys and values are in its pages."""
        seq, lane = row.seq, self.lanes[row.seq.lane]
        seq.computed = row.stop
        seq.copy = None
        if seq.embeddings is not None:
            lane.prompts.computed(seq, row.stop - row.start)
        else:
            self.publish(seq)

    def publish(self, seq: Sequence) -> None:
        """Let pages be found that are full of known tokens."""
        if not self.config.enable_prefix_caching or seq.whole_prompt:
            return
        lane = self.lanes[seq.lane]
        keys = seq.full_block_keys(self.config.block_size, min(seq.computed, seq.known))
        shared = seq.offset // self.config.block_size
        for index in range(seq.published, len(keys)):
            lane.blocks.publish(seq.blocks[shared + index], keys[index])
        seq.published = max(seq.published, len(keys))

    def preempt(self, seq: Sequence) -> None:
        """Take the pages of a running request; it waits to be recomputed, in front of its queue."""
        assert not seq.final and seq.known == len(seq.tokens), "a request of a step under way keeps its pages"
        self.preemptions += 1
        self._vacate(seq)
        self.waiting.push(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a request, wherever it is, and everything it holds."""
        if seq is self._held:
            self._held = None
        if seq in self.running:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        for stream in seq.streams:
            self.lanes[stream.lane].rows -= 1
            self.lanes[stream.lane].blocks.release(stream.blocks)
            stream.blocks = []
            stream.copy = None
            stream.computed = 0
            stream.published = 0
            stream.logits = None
        self._release_slots(seq, used=True)

    def check_integrity(self, *adapter_pins: Callable[[str], int]) -> None:
        """Pages, slots and queues agree. ``adapter_pins(version)``: pins the slots of each lane believe in.

        Raises:
            AssertionError: saying what does not hold.
        """
        waiting = [stream for seq in self.waiting for stream in seq.streams]
        running = [stream for seq in self.running for stream in seq.streams]
        assert not set(map(id, waiting)) & set(map(id, running)), "a sequence is both waiting and running"
        assert all(not seq.blocks and seq.slot == -1 for seq in waiting), "a waiting sequence holds pages or a slot"
        assert all(seq.logits is None for seq in waiting), "a waiting sequence keeps logits"
        assert all(seq.remaining > 0 or seq.logits is not None for seq in running), "a sequence has nothing to compute"
        assert all(seq.computed == s.computed for seq in self.running for s in seq.abreast), "streams are not abreast"
        for index, (lane, pins) in enumerate(zip(self.lanes, adapter_pins, strict=True)):
            rows = [seq for seq in running if seq.lane == index]
            assert lane.rows == len(rows), f"{len(rows)} rows of lane {index}, counted as {lane.rows}"
            lane.blocks.check_integrity([*(seq.blocks for seq in rows), *lane.prompts.held])
            adapters = Counter(seq.adapter for seq in rows if seq.adapter is not None)
            for version, count in adapters.items():
                assert pins(version) == count, f"{version}: {pins(version)} pins, {count} running rows"
            on_prompts = Counter(seq.adapter for seq in rows if seq.prompt is not None)
            for prompted, users in on_prompts.items():
                assert prompted and lane.prompts.users(prompted) == users, f"{prompted}: users of its prompt"


def _whole_tokens(seq: Sequence, lane: int) -> int:
    """Tokens of a request's prompts in a lane that must be computed in one step."""
    return sum(stream.prompt_len for stream in seq.streams if stream.lane == lane and stream.uncut)


def _reserved(seq: Sequence, lane: int) -> int:
    """Tokens in a lane without which a request gets no further: of one that is abreast already, one of each stream."""
    return sum(stream.lane == lane for stream in seq.abreast) if seq.blocks else _whole_tokens(seq, lane)


def _share(part: list[Sequence], budget: list[int]) -> int:
    """Tokens that each stream of a part can compute."""
    if len(part) == 1:  # as almost all are
        return min(part[0].remaining, budget[part[0].lane])
    rows = Counter(seq.lane for seq in part)
    return min(part[0].remaining, *(budget[lane] // count for lane, count in rows.items()))


def _advance(part: list[Sequence], count: int, budget: list[int]) -> list[Row]:
    """Rows of ``count`` tokens for each stream of a part, taken off the budget; none of no tokens."""
    for seq in part:
        budget[seq.lane] -= count
    return [Row(seq, seq.computed, seq.computed + count) for seq in part] if count else []


def _added(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]
