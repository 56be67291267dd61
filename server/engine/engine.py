"""The engine: takes requests, runs steps, hands out tokens. One thread calls it; nothing here knows of HTTP."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from weft.server.config import EngineConfig
from weft.server.engine import startup
from weft.server.engine.counters import Counters
from weft.server.engine.frozen import FrozenModel
from weft.server.engine.info import AdapterInfo, EngineStats
from weft.server.engine.intake import NO_FIT, Intake
from weft.server.engine.mixing import gather
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.engine.sampler import Sample, Sampler, fill_prompt_logprobs
from weft.server.engine.scheduler import Row, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.errors import InvalidRequest, NotFound, Overloaded


class Engine:
    """A frozen base model, further frozen models beside it, and the requests on them.

    Methods belong to one thread, but for those that say "any thread".

    Args:
        progress: told what start-up is busy with.

    Raises:
        ConfigError: the model or a setting cannot be honoured.
    """

    def __init__(self, config: EngineConfig, *, progress: startup.Progress | None = None) -> None:
        started = time.perf_counter()
        self.config = config
        self._arrived = threading.Event()
        loaded = startup.load(config, self._arrived, progress or (lambda stage: None))
        names = [None, *(name for name, _ in config.proxy_models)]
        self.models = {
            name: FrozenModel(config, each, lane) for lane, (name, each) in enumerate(zip(names, loaded, strict=True))
        }
        self._lanes = list(self.models.values())
        main = self._lanes[0]
        self.adapters, self.runner = main.adapters, main.runner
        self._intake = Intake(config, self.models)
        self._scheduler = Scheduler(config, [(model.blocks, model.adapters) for model in self._lanes])
        self._sampler = Sampler(main.info.eos_token_ids)
        self._counters = Counters()
        self._live: dict[str, Sequence] = {}
        self._unsized: dict[str, Sequence] = {}
        self._ended: list[TokenDelta] = []
        self.info = replace(
            main.info,
            load_seconds=time.perf_counter() - started,
            proxies={name: model.info for name, model in self.models.items() if name is not None},
        )

    def add(self, request: EngineRequest) -> None:
        """Accept a request; from now on it gets tokens and exactly one last delta.

        Raises:
            InvalidRequest: naming the field. NotFound: its adapter is not registered. Overloaded: the queue is full.
        """
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        streams = self._intake.check(request)
        if len(self._scheduler.waiting) >= self.config.max_queued_requests:
            raise Overloaded(f"{len(self._scheduler.waiting)} requests are waiting already")
        seq = self._intake.start(streams)
        self._live[request.request_id] = seq
        if seq.followers and self._intake.fit_together(seq.streams) is None:
            self._unsized[request.request_id] = seq
        self._scheduler.add(seq)
        self._counters.accepted(seq)

    def abort(self, request_id: str) -> None:
        """End a request, if it is live; the next step's deltas hold its last one."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq)
            self._ended.append(TokenDelta(request_id, finish_reason="abort"))

    def step(self) -> list[TokenDelta]:
        """One forward pass of each model over whatever can run, or none while all wait for adapters to arrive."""
        self.poll()
        deltas = []
        rows = self._scheduler.schedule()
        passes = [
            model.forward([row for row in rows if row.seq.lane == model.lane], lane.prompts)
            for model, lane in zip(self._lanes, self._scheduler.lanes, strict=True)
        ]
        if rows:
            fill_prompt_logprobs(passes, self.info.vocab_size)
            ready = gather(passes, self.info.vocab_size, self.info.eos_token_ids)
            samples = self._sampler.sample(ready.logits, ready.seqs, ready.peaks) if ready else []
            deltas = self._commit(rows, samples)
            self._counters.stepped(each.batch for each in passes if each is not None)
        ended, self._ended = self._ended, []
        return ended + deltas

    def poll(self) -> None:
        """Take in adapters that have arrived and forget those unregistered; ``step`` does so too.

        Requests for an adapter that could not be loaded end with its error.
        """
        for model, lane in zip(self._lanes, self._scheduler.lanes, strict=True):
            for version, error in model.adapters.poll():
                for seq in list(self._live.values()):
                    if any(stream.lane == model.lane and stream.adapter == version for stream in seq.streams):
                        self._fail(seq, str(error))
            lane.prompts.prune(model.adapters.knows)
            model.prune()
        for request_id, seq in list(self._unsized.items()):
            fits = self._intake.fit_together(seq.streams)
            if fits is False:
                self._fail(seq, NO_FIT)
            elif fits:
                del self._unsized[request_id]

    def _commit(self, rows: list[Row], samples: list[Sample]) -> list[TokenDelta]:
        """Write down what the step computed; returns what it added to the requests."""
        for row in rows:
            self._scheduler.computed(row)
        deltas = []
        for sample in samples:
            if sample.token is None:
                self._discard(sample.seq)
            else:
                deltas.append(self._append(sample.seq, sample.token, sample))
        return deltas

    def _append(self, seq: Sequence, token: int, sample: Sample) -> TokenDelta:
        first = seq.output_len == 0
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None  # they come once
        for stream in seq.streams:
            stream.tokens.append(token)
        self._counters.generated(seq)
        finish, stop = self._finish_reason(seq, token)
        if finish is not None:
            self._end(seq)
        return TokenDelta(
            seq.request.request_id,
            [token],
            logprobs=[sample.logprobs] if sample.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_reason=stop,
            cached_tokens=seq.cached_tokens if first else 0,
            queue_seconds=seq.queue_seconds if first else None,
            compose_seconds=self._compose_seconds(seq) if first else None,
        )

    def _compose_seconds(self, seq: Sequence) -> float | None:
        """What the weighting step took that a request waited for; None if it is on no composition."""
        if seq.adapter is None:
            return None
        seconds = self.adapters.compose_seconds(seq.adapter, seq.accepted)
        if seconds == 0.0:
            self._counters.composition_hits += 1
        return seconds

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[str | None, int | None]:
        params = seq.request.params
        if seq.output_len >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if token in self.info.eos_token_ids and not params.ignore_eos:
                return "stop", None
        return ("length" if len(seq.tokens) >= seq.max_len else None), None

    def _discard(self, seq: Sequence) -> None:
        """End a request whose logits are not numbers; what is not a number must not stay in pages others may get."""
        for stream in seq.streams:
            self._lanes[stream.lane].scrub(stream)
        self._fail(seq, "the model's output is not a number (NaN or infinity)")

    def _fail(self, seq: Sequence, message: str) -> None:
        self._end(seq)
        self._ended.append(TokenDelta(seq.request.request_id, finish_reason="error", error=message))

    def _end(self, seq: Sequence) -> None:
        """Forget a request and give back all it holds."""
        self._scheduler.finish(seq)
        del self._live[seq.request.request_id]
        self._unsized.pop(seq.request.request_id, None)
        for stream in seq.streams:
            if stream.adapter is not None:
                self._lanes[stream.lane].adapters.drop(stream.adapter)

    @property
    def has_work(self) -> bool:
        """Requests are live, or deltas are waiting to be handed out."""
        return bool(self._live or self._ended)

    @property
    def steps(self) -> int:
        """Forward passes so far."""
        return self._counters.steps

    @property
    def step_adapters(self) -> int:
        """Distinct adapters in the last one, the base not counted."""
        return self._counters.step_adapters

    @property
    def settled(self) -> bool:
        """No adapter is being loaded and none is left to forget."""
        return all(model.adapters.idle for model in self._lanes)

    def wait(self, timeout: float) -> None:
        """Sleep until an adapter's load ends, at most ``timeout`` seconds."""
        self._arrived.wait(timeout)

    def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo:
        """Read, check and compile an adapter; requests may name its version afterwards. Slow; any thread.

        Args:
            model: name of the further model it is for; None: the main one.

        Raises:
            AdapterError: why it cannot be served; nothing is left behind.
        """
        adapter = self._model(model).register(version, folder)
        prompt = adapter.prompt
        return AdapterInfo(
            version,
            adapter.method,
            adapter.forms,
            adapter.rank,
            len(adapter.sites),
            adapter.nbytes,
            prompt.length if prompt else 0,
            prompt.position_offset if prompt else 0,
            adapter.choices,
            adapter.invocation,
            adapter.whole_prompts,
        )

    def unregister_adapter(self, version: str, model: str | None = None) -> None:
        """Forget an adapter once no live request holds it. Any thread; takes effect at the next ``poll``."""
        self._model(model).adapters.unregister(version)

    def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None:
        """Keep these versions of a model's, and no others, on the device whether they are used or not. Any thread.

        Raises:
            AdapterTooLarge: some other adapter would then never find room.
        """
        self._model(model).adapters.pin(versions)

    def _model(self, name: str | None) -> FrozenModel:
        if name not in self.models:
            raise NotFound(f"there is no further model {name!r}", param="model")
        return self.models[name]

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        further = {name: model.adapters for name, model in self.models.items() if name is not None}
        return self._counters.snapshot(self._scheduler, self.adapters, further)

    def close(self) -> None:
        """Stop the background loaders."""
        for model in self._lanes:
            model.adapters.close()

    def check_integrity(self) -> None:
        """Pages, slots, queues and reference counts agree.

        Raises:
            AssertionError: saying what does not hold.
        """
        self._scheduler.check_integrity(*(model.adapters.pins for model in self._lanes))
        known = {id(seq) for seq in (*self._scheduler.running, *self._scheduler.waiting)}
        assert known == {id(seq) for seq in self._live.values()}, "live requests and the scheduler's disagree"
        streams = [stream for seq in self._live.values() for stream in seq.streams]
        for model in self._lanes:
            model.adapters.check_integrity()
            holds = Counter(parent for seq in streams if seq.lane == model.lane for parent in seq.parents)
            for version, count in model.adapters.holds().items():
                assert count == holds[version], f"{version} is held {count} times by {holds[version]} live streams"
