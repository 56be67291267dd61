"""What the engine counts, and the snapshot of everything that metrics are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from weft.adapters.residency import Residency
from weft.server.engine.batch import Batch
from weft.server.engine.info import AdapterStats, EngineStats, ModelStats
from weft.server.engine.request import COMPOSED
from weft.server.engine.scheduler import Lane, Scheduler
from weft.server.engine.sequence import Sequence


class Counters:
    """Counts steps and tokens, tokens by adapter name ("" is the base).

    Attributes:
        steps: forward passes. step_adapters: distinct adapters in the last one, the base not counted.
    """

    def __init__(self) -> None:
        self.composition_hits = 0
        self._tokens: dict[str, Counter[str]] = {}
        self._versions: dict[str, str] = {}  # the version each adapter name last stood for
        self.steps = self.step_adapters = 0
        self._max_step_adapters = self._batch_tokens = 0

    def accepted(self, seq: Sequence) -> None:
        """A request was accepted."""
        version = seq.request.adapter or next(iter(seq.parents), None)
        if version is not None and seq.name != COMPOSED:
            self._versions[seq.name] = version
        self._of(seq)["prompt_tokens"] += seq.prompt_len

    def generated(self, seq: Sequence) -> None:
        """A token was generated."""
        self._of(seq)["generation_tokens"] += 1

    def stepped(self, batches: Iterable[Batch]) -> None:
        """A step ran: a forward pass of every model that had rows."""
        batches = list(batches)
        self.steps += 1
        self.step_adapters = sum(batch.num_adapters for batch in batches)
        self._max_step_adapters = max(self._max_step_adapters, self.step_adapters)
        self._batch_tokens += sum(batch.attention.num_tokens for batch in batches)

    def snapshot(
        self, scheduler: Scheduler, adapters: Residency, further: Mapping[str, Residency] = MappingProxyType({})
    ) -> EngineStats:
        """Everything there is to know at this moment.

        Args:
            adapters: of the main model. further: of the others by name, in the order of the scheduler's lanes.
        """
        self._forget_names(scheduler, adapters)
        running = Counter(seq.name for seq in scheduler.running)
        waiting = scheduler.waiting.counts()
        everywhere = zip(scheduler.lanes, [adapters, *further.values()], strict=True)
        main, *others = [_of_model(lane, its_adapters) for lane, its_adapters in everywhere]
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self.steps,
            step_adapters=self.step_adapters,
            max_step_adapters=self._max_step_adapters,
            adapter_prompt_tokens=sum(lane.prompts.tokens_computed for lane in scheduler.lanes),
            batch_tokens=self._batch_tokens,
            preemptions=scheduler.preemptions,
            prefix_cache_queries=scheduler.cache_queries,
            prefix_cache_hits=scheduler.cache_hits,
            adapters={
                name: AdapterStats(running[name], waiting.get(name, 0), **self._tokens.get(name, Counter()))
                for name in {*self._tokens, *running, *waiting}
            },
            proxies=dict(zip(further, others, strict=True)),
            **{name: value for name, value in vars(main).items() if name != "running"},
            compositions=adapters.compositions,
            composition_seconds_sum=adapters.composition_seconds,
            composition_hits=self.composition_hits,
        )

    def _of(self, seq: Sequence) -> Counter[str]:
        return self._tokens.setdefault(seq.name, Counter())

    def _forget_names(self, scheduler: Scheduler, adapters: Residency) -> None:
        """Drop the counters of names whose adapter is gone, so that they do not pile up."""
        for name in [name for name, version in self._versions.items() if not adapters.knows(version)]:
            del self._versions[name]
            self._tokens.pop(name, None)
            scheduler.waiting.forget(name)


def _of_model(lane: Lane, adapters: Residency) -> ModelStats:
    blocks, pool = lane.blocks, adapters.pool
    return ModelStats(
        running=lane.rows,
        blocks_used=blocks.num_blocks - blocks.num_free,
        blocks_total=blocks.num_blocks,
        tiers=adapters.tiers(),
        refcounts=adapters.holds(),
        slots_used=pool.slots_used,
        slots_total=pool.num_slots,
        device_bytes=pool.nbytes_used,
        device_bytes_total=pool.nbytes_total,
        host_bytes=adapters.host_bytes_used,
        loads=adapters.loads,
        load_seconds_sum=adapters.load_seconds,
        evictions=adapters.evictions,
    )
