"""Decides what runs in the next step: continuous batching, chunked prefill, prefix cache, preemption, fairness."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
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

    def acquire(self, version: str) -> int | None:
        """Pin the adapter's slot and return it, or None while it is not on the device (a load is then under way)."""

    def release(self, version: str) -> None:
        """Give back one pin."""

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


class Scheduler:
    """Queues, running rows and their pages.

    Invariants: a sequence is waiting or running, never both; a waiting one holds no pages and no slot pin; running
    ones are in the order of their admission, so the last one is the first to be preempted.
    """

    def __init__(self, config: EngineConfig, blocks: BlockPool, slots: Slots) -> None:
        self.config = config
        self.blocks = blocks
        self.slots = slots
        self.prompts = PromptPages(blocks, config.block_size)
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
        """The rows of the next step, decoding ones first. Their pages are allocated.

        A prompt that is computed whole and found too little budget left has what it takes reserved in the next step,
        in which decoding rows may have to pause; never in two steps in a row.
        """
        held, self._held = self._held, None
        budget = self.config.max_num_batched_tokens - (held.prompt_len if held else 0)
        preemptions = self.preemptions
        decoding = [seq for seq in self.running if seq.remaining == 1]
        rows = self._extend(decoding, budget)
        budget -= len(rows)
        prefilling = [*self.prompts.makers(), *(seq for seq in self.running if seq.remaining > 1)]
        rows += self._extend(prefilling, budget)
        # Whoever was preempted for the sake of another must not run.
        rows = [row for row in rows if row.seq.blocks]
        if self.preemptions == preemptions:  # pages are short otherwise, and admitting would preempt again
            rows += self._admit(self.config.max_num_batched_tokens - sum(row.stop - row.start for row in rows), held)
        for row in rows:
            if row.seq.embeddings is None:
                self.waiting.charge(row.seq.name, row.stop - row.start)
        return rows

    def _extend(self, seqs: list[Sequence], budget: int) -> list[Row]:
        """Rows for running sequences, oldest first, preempting the youngest when pages run out."""
        rows: list[Row] = []
        for seq in seqs:
            count = min(seq.remaining, budget)
            if count == 0 or not seq.blocks:  # no budget left, or preempted for an older one
                continue
            while not self._reserve(seq, seq.computed + count):
                victim = self.running[-1]
                self.preempt(victim)
                if victim is seq:
                    break
            else:
                rows.append(Row(seq, seq.computed, seq.computed + count))
                budget -= count
        return rows

    def _admit(self, budget: int, held: Sequence | None) -> list[Row]:
        """Rows for waiting sequences, ``held`` first, while there are budget, rows, pages and slots."""
        rows: list[Row] = []
        first = held
        while budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self._next(first)
            if seq is None:
                break
            cached = self._cached_blocks(seq)
            while not (room := self._has_room(seq, cached)) and self.prompts.evict():
                cached = self._cached_blocks(seq)
            if room and seq.whole_prompt and seq.prompt_len > budget:
                room, self._held = False, None if held else seq
            if not room:
                self._release_slot(seq)
                break
            first = None
            self.waiting.remove(seq)
            self.running.append(seq)
            self._reuse(seq, cached)
            # The whole prompt at once, though it may be computed in chunks: whoever is admitted can be computed.
            reserved = self._reserve(seq, len(seq.tokens))
            assert reserved, "admission checked that the pages are there"
            count = min(seq.remaining, budget)
            rows.append(Row(seq, seq.computed, seq.computed + count))
            budget -= count
        return rows

    def _next(self, only: Sequence | None) -> Sequence | None:
        """Whom to admit next, its slot acquired; no one but ``only``, if it is given."""
        return self.waiting.next(lambda seq: only in (None, seq) and self._acquire_slot(seq))

    def _acquire_slot(self, seq: Sequence) -> bool:
        version = seq.adapter
        if version is not None:
            slot = self.slots.acquire(version)
            if slot is None:
                return False
            seq.prompt = self.slots.prompt(version)
            if seq.prompt is not None:
                blocks = self.prompts.acquire(version, seq.prompt)
                if blocks is None:
                    self.slots.release(version)
                    return False
                seq.prompt_blocks = blocks
            seq.slot = slot
        return True

    def _release_slot(self, seq: Sequence) -> None:
        if seq.adapter is not None and seq.slot >= 0:
            self.slots.release(seq.adapter)
            if seq.prompt is not None:
                self.prompts.release(seq.adapter)
        seq.slot = -1
        seq.prompt_blocks = []

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Pages already computed for a prefix of the tokens; at least one token is left to compute."""
        if not self.config.enable_prefix_caching or seq.whole_prompt or seq.request.params.prompt_logprobs is not None:
            return []
        return self.blocks.lookup(seq.full_block_keys(self.config.block_size, len(seq.tokens) - 1))

    def _has_room(self, seq: Sequence, cached: list[int]) -> bool:
        """Whether all known tokens and one more fit; a watermark against admitting only to preempt again."""
        free_after_share = self.blocks.num_free - sum(self.blocks.is_free(block) for block in cached)
        watermark = len(self.running)  # every running row may need a page in this very step
        shared = seq.offset // self.config.block_size
        needed = seq.pages(self.config.block_size, len(seq.tokens) + 1) - shared - len(cached)
        return needed + (watermark if self.running else 0) <= free_after_share

    def _reuse(self, seq: Sequence, cached: list[int]) -> None:
        """Begin with the pages that are there: of the adapter's prompt, then of a cached prefix of the tokens."""
        size = self.config.block_size
        shared = seq.prompt_blocks[: seq.offset // size]
        self.blocks.share(shared + cached)
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
        blocks = self.blocks.allocate(missing)
        while blocks is None and self.prompts.evict():
            blocks = self.blocks.allocate(missing)
        if blocks is None:
            return False
        shared, tail = divmod(seq.offset, self.config.block_size)
        if tail and len(seq.blocks) == shared:
            seq.copy = (seq.prompt_blocks[shared], blocks[0])
        seq.blocks += blocks
        return True

    def computed(self, row: Row) -> None:
        """The row's keys and values are in its pages now: full pages become findable."""
        seq = row.seq
        seq.computed = row.stop
        seq.copy = None
        if seq.embeddings is not None:
            self.prompts.computed(seq, row.stop - row.start)
        elif self.config.enable_prefix_caching and not seq.whole_prompt:
            keys = seq.full_block_keys(self.config.block_size, seq.computed)
            shared = seq.offset // self.config.block_size
            for index in range(seq.published, len(keys)):
                self.blocks.publish(seq.blocks[shared + index], keys[index])
            seq.published = max(seq.published, len(keys))

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's pages; it waits to be recomputed, in front of its queue."""
        self.preemptions += 1
        self._vacate(seq)
        self.waiting.push(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it is, and everything it holds."""
        if seq is self._held:
            self._held = None
        if seq in self.running:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.release(seq.blocks)
        seq.blocks = []
        seq.copy = None
        seq.computed = 0
        seq.published = 0
        self._release_slot(seq)

    def check_integrity(self, adapter_pins: Callable[[str], int]) -> None:
        """Pages, slots and queues agree. ``adapter_pins(version)``: pins the slots believe in.

        Raises:
            AssertionError: saying what does not hold.
        """
        self.blocks.check_integrity([*(seq.blocks for seq in self.running), *self.prompts.held])
        waiting = list(self.waiting)
        assert not set(map(id, waiting)) & set(map(id, self.running)), "a sequence is both waiting and running"
        assert all(not seq.blocks and seq.slot == -1 for seq in waiting), "a waiting sequence holds pages or a slot"
        pins: dict[str, int] = {}
        for seq in self.running:
            if seq.adapter is not None:
                pins[seq.adapter] = pins.get(seq.adapter, 0) + 1
        for version, count in pins.items():
            assert adapter_pins(version) == count, f"{version}: {adapter_pins(version)} pins, {count} running rows"
        on_prompts = Counter(seq.adapter for seq in self.running if seq.prompt is not None)
        for prompted, rows in on_prompts.items():
            assert prompted is not None and self.prompts.users(prompted) == rows, f"{prompted}: users of its prompt"
