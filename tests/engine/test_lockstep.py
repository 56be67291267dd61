"""Requests of several streams in several lanes, without a model: none waits for ever, none leaves anything behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.adapters.forms import SoftPrompt
from weft.server.config import EngineConfig
from weft.server.engine.blocks import BlockPool, root_key
from weft.server.engine.pending import placeholder
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.scheduler import Row, Scheduler
from weft.server.engine.sequence import Mix, Sequence

SIZE = 4
LANES = 2
LOAD_STEPS = 2


@dataclass
class FewSlots:
    """Slots for some of the adapters; what was loaded for a waiting request leaves for an urgent one alone.

    Adapters of odd number put a prompt of that length in front.
    """

    slots: int
    pins: dict[str, int] = field(default_factory=dict)
    arriving: dict[str, int] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)

    def poll(self) -> None:
        for version in list(self.arriving):
            self.arriving[version] -= 1
            if not self.arriving[version]:
                del self.arriving[version]
                self.pins[version] = 0
                self.fresh.add(version)

    def acquire(self, version: str, *, urgent: bool = False) -> int | None:
        if version in self.pins:
            self.pins[version] += 1
            self.fresh.discard(version)
            return int(version)
        if version in self.arriving:
            return None
        idle = [v for v, pins in self.pins.items() if not pins and (urgent or v not in self.fresh)]
        if len(self.pins) + len(self.arriving) == self.slots and idle:
            self.fresh.discard(idle[0])
            del self.pins[idle[0]]
        if len(self.pins) + len(self.arriving) < self.slots:
            self.arriving[version] = LOAD_STEPS
        return None

    def release(self, version: str, *, used: bool = True) -> None:
        self.pins[version] -= 1
        if not used:
            self.fresh.add(version)

    def prompt(self, version: str) -> SoftPrompt | None:
        return _prompt(version)

    def knows(self, version: str) -> bool:
        return True


def _prompt(version: str | None) -> SoftPrompt | None:
    return SoftPrompt(torch.zeros(int(version), 2)) if version is not None and int(version) % 2 else None


@dataclass(frozen=True)
class Plan:
    """A request: (lane, adapter, prompt's length) of each stream, its output, when it arrives and is aborted.

    ``stop``: the token of its output after which it turns out to have ended.
    ``scored``: log-probabilities of its prompt are asked for, which then is as long in all streams.
    """

    streams: tuple[tuple[int, str | None, int], ...]
    output: int
    arrival: int
    abort: int | None
    stop: int | None
    scored: bool

    @property
    def lengths(self) -> list[int]:
        return [self.streams[0][2] if self.scored else length for _, _, length in self.streams]

    def fits(self, pages: list[int], slots: int, rows: int, budget: int) -> bool:
        """What the engine checks before it takes a request in."""
        for lane in range(LANES):
            streams = zip(self.streams, self.lengths, strict=True)
            mine = [(adapter, length) for (where, adapter, _), length in streams if where == lane]
            if self.scored and len(mine) > budget:
                return False
            own = [prompt.length if (prompt := _prompt(adapter)) else 0 for adapter, _ in mine]
            tokens = (pages[lane] - sum(n % SIZE > 0 for n in own)) * SIZE - len(mine) * (SIZE - 1)
            if sum(own) + sum(length + self.output for _, length in mine) > tokens and mine:
                return False
            if len({adapter for adapter, _ in mine} - {None}) > slots or len(mine) > rows:
                return False
        return True


def streams_of() -> st.SearchStrategy[tuple[tuple[int, str | None, int], ...]]:
    adapters = st.sampled_from([None, "1", "2", "3", "4", "5"])
    follower = st.tuples(st.integers(0, LANES - 1), adapters, st.integers(1, 14))
    own = st.tuples(st.just(0), adapters, st.integers(1, 14))
    return st.builds(lambda first, rest: (first, *rest), own, st.lists(follower, max_size=3))


plans = st.lists(
    st.builds(
        Plan,
        streams_of(),
        st.integers(1, 12),
        st.integers(0, 30),
        st.none() | st.integers(0, 60),
        st.none() | st.integers(1, 12),
        st.booleans(),
    ),
    max_size=12,
)


@dataclass
class Flight:
    """A step under way: who has rows in it, who gets a token, and who ended since it was launched."""

    leaders: set[Sequence]
    sampled: list[Sequence] = field(default_factory=list)
    leaving: list[Sequence] = field(default_factory=list)


class Bench:
    """A scheduler, and what the engine does with its steps: who has arrived waits for its partners.

    ``ahead``: a step is launched before the tokens of the one before it are known.
    """

    def __init__(self, pages: list[int], slots: int, ahead: bool, **config: Any) -> None:
        self.ahead = ahead
        self.flights: list[Flight] = []
        self.stops: dict[Sequence, int | None] = {}
        self.slots = [FewSlots(slots) for _ in range(LANES)]
        settings_ = EngineConfig("none", block_size=SIZE, **config)
        pools = zip((BlockPool(count) for count in pages), self.slots, strict=True)
        self.scheduler = Scheduler(settings_, list(pools))
        self.live: list[Sequence] = []

    def add(self, plan: Plan, name: str) -> Sequence:
        made = []
        for (lane, adapter, _), length in zip(plan.streams, plan.lengths, strict=True):
            params = SamplingParams(prompt_logprobs=0 if plan.scored and not made else None)
            request = EngineRequest(name, [len(made) + 3] * length, params, adapter, adapter)
            root = root_key(f"model {lane}", adapter, None)
            seq = Sequence.start(request, root, length + plan.output, _prompt(adapter))
            seq.lane = lane
            made.append(seq)
        leader, *leader.followers = made
        for follower in leader.followers:
            follower.leader = leader
        if leader.followers:
            leader.mix = Mix(10, None)
        self.scheduler.add(leader)
        self.live.append(leader)
        self.stops[leader] = plan.stop
        return leader

    def end(self, leader: Sequence) -> None:
        self.live.remove(leader)
        leader.final = True
        flight = next((flight for flight in self.flights if leader in flight.leaders), None)
        if flight is None:
            self.scheduler.finish(leader)
        else:
            flight.leaving.append(leader)

    def land(self) -> None:
        """The tokens of the oldest step under way are known."""
        flight = self.flights.pop(0)
        for leader in flight.sampled:
            if leader in self.live:
                leader.prompt_logprobs = None
                for seq in leader.streams:
                    seq.tokens[seq.known] = 9
                    self.scheduler.publish(seq)
                output = leader.known - leader.prompt_len
                if leader.known == leader.max_len or output == self.stops[leader]:
                    self.end(leader)
        for leader in flight.leaving:
            self.scheduler.finish(leader)

    def step(self) -> None:
        for slots in self.slots:
            slots.poll()
        if self.flights and not self.scheduler.roomy:
            self.land()
        rows = self.scheduler.schedule()
        budget, limit = self.scheduler.config.max_num_batched_tokens, self.scheduler.config.max_num_seqs
        for index, lane in enumerate(self.scheduler.lanes):
            mine = [row for row in rows if row.seq.lane == index]
            assert sum(row.stop - row.start for row in mine) <= budget and lane.rows <= limit
            written = [block for row in mine for block in _written(row)]
            assert len(written) == len(set(written)), "two rows write to one page"
        arrived = [row.seq for row in rows if row.samples]
        for leader in self.live:
            parts = [(row.start, row.stop) for row in rows if row.seq in leader.abreast]
            assert not parts or parts == [parts[0]] * len(leader.streams), "logits of one distribution in two steps"
        for row in rows:
            assert len(row.seq.blocks) * SIZE >= row.seq.offset + row.stop, "a row without the pages it writes to"
            self.scheduler.computed(row)
        for seq in arrived:
            seq.logits = torch.zeros(1)
        flight = Flight({row.seq.owner for row in rows})
        for leader in dict.fromkeys(seq.owner for seq in arrived):
            if all(seq.logits is not None for seq in leader.streams):
                flight.sampled.append(leader)
                for seq in leader.streams:
                    seq.tokens.append(placeholder(0))
                    seq.logits = None
                leader.final = len(leader.tokens) == leader.max_len
        self.flights += [flight] if rows else []
        while len(self.flights) > bool(rows and self.ahead):
            self.land()
        self.scheduler.check_integrity(*(lambda version, s=s: s.pins.get(version, 0) for s in self.slots))


def _written(row: Row) -> list[int]:
    """Pages that a row writes to."""
    if row.seq.embeddings is not None:
        return []
    first = (row.seq.offset + row.start) // SIZE
    return row.seq.blocks[first : (row.seq.offset + row.stop - 1) // SIZE + 1]


@given(
    asked=plans,
    pages=st.lists(st.integers(8, 40), min_size=LANES, max_size=LANES),
    slots=st.integers(1, 4),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 8),
    caching=st.booleans(),
    ahead=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_request_ends_and_nothing_is_left(
    asked: list[Plan], pages: list[int], slots: int, tokens: int, rows: int, caching: bool, ahead: bool
) -> None:
    bench = Bench(pages, slots, ahead, max_num_batched_tokens=tokens, max_num_seqs=rows, enable_prefix_caching=caching)
    left = [plan for plan in asked if plan.fits(pages, slots, rows, tokens)]
    leaders: list[tuple[Plan, Sequence]] = []
    step = 0
    while left or bench.live or bench.flights:
        for plan in [plan for plan in left if plan.arrival <= step]:
            left.remove(plan)
            leaders.append((plan, bench.add(plan, str(len(leaders)))))
        for plan, leader in leaders:
            if plan.abort == step and leader in bench.live:
                bench.end(leader)
        bench.step()
        step += 1
        assert step < 5000, "somebody waits for ever"
    for plan, leader in leaders:
        done = {seq.known - seq.prompt_len for seq in leader.streams}
        wanted = min(plan.output, plan.stop or plan.output)
        assert len(done) == 1 and (plan.abort is not None or done == {wanted}), "streams are not in step"
    for index, lane in enumerate(bench.scheduler.lanes):
        held = sum(map(len, lane.prompts.held))
        assert lane.blocks.num_free == lane.blocks.num_blocks - held and not any(bench.slots[index].pins.values())
