"""The engine: takes requests, runs steps, hands out tokens. One thread calls it; nothing here knows of HTTP."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from weft.server.config import EngineConfig
from weft.server.engine import startup
from weft.server.engine.counters import Counters
from weft.server.engine.flight import Flight, Launcher
from weft.server.engine.frozen import FrozenModel
from weft.server.engine.info import AdapterInfo, EngineStats
from weft.server.engine.intake import NO_FIT, Intake
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.engine.sampler import Sample
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.errors import InvalidRequest, NotFound, Overloaded


class Engine:
    """A frozen base model, further frozen models beside it, and the requests on them.

    Methods belong to one thread, but for those that say "any thread".

    A step is launched, and *lands* when its tokens are read. With ``async_scheduling`` the next one is launched before,
    so that the device need not wait for the host. It takes the tokens that the host does not know yet from the device,
    and computes one more token of requests that turn out to have ended, which is dropped. All steps run one after the
    other on one stream of the device: a later one finds what an earlier one wrote, and overwrites no page too early.

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
        self._launcher = Launcher(self._scheduler, self._lanes, main.info.vocab_size, main.info.eos_token_ids)
        self._counters = Counters()
        self._live: dict[str, Sequence] = {}
        self._unsized: dict[str, Sequence] = {}
        self._ended: list[TokenDelta] = []
        self._flights: deque[Flight] = deque()
        on_gpu = main.runner.device.type == "cuda"
        self._ahead = on_gpu if config.async_scheduling is None else config.async_scheduling
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
        """Launch one forward pass of each model over whatever can run, or none while all wait for adapters to arrive.

        Returns:
            What the steps that landed added to the requests: the one launched here or, running ahead, the one before.
        """
        self.poll()
        deltas = []
        if self._flights and not self._scheduler.roomy:
            # Whoever is preempted must have all its tokens, and pages that no step under way writes to.
            deltas += self._land()
        stays = int(self._launch() and self._ahead)
        while len(self._flights) > stays:
            deltas += self._land()
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

    def _launch(self) -> bool:
        """Start a step; False if nothing can run."""
        flight = self._launcher.launch(self._flights[-1] if self._flights else None)
        if flight is None:
            return False
        self._flights.append(flight)
        self._counters.stepped(flight.batches)
        return True

    def _land(self) -> list[TokenDelta]:
        """Wait for the oldest step and write down its tokens; returns what it added to the requests."""
        flight = self._flights.popleft()
        deltas = []
        for sample in flight.land():
            if sample.token is None:
                self._discard(sample.seq)
            elif self._is_live(sample.seq):
                deltas.append(self._append(sample.seq, sample.token, sample))
        for seq in flight.leaving:
            self._release(seq)
        return deltas

    def _append(self, seq: Sequence, token: int, sample: Sample) -> TokenDelta:
        first = sample.index == 0
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None  # they come once
        for stream in seq.streams:
            stream.tokens[stream.prompt_len + sample.index] = token
            self._scheduler.publish(stream)
        self._counters.generated(seq)
        finish, stop = self._finish_reason(seq, token, sample.index + 1)
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

    def _finish_reason(self, seq: Sequence, token: int, count: int) -> tuple[str | None, int | None]:
        """Whether ``token`` ends the output, as the ``count``-th of it."""
        params = seq.request.params
        if count >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if token in self.info.eos_token_ids and not params.ignore_eos:
                return "stop", None
        return ("length" if seq.prompt_len + count >= seq.max_len else None), None

    def _discard(self, seq: Sequence) -> None:
        """End a request whose logits are not numbers; what is not a number must not stay in pages others may get.

        One that ended while the step was under way is discarded as well: it still has the pages.
        """
        for stream in seq.streams:
            self._lanes[stream.lane].scrub(stream)
        if self._is_live(seq):
            self._fail(seq, "the model's output is not a number (NaN or infinity)")

    def _fail(self, seq: Sequence, message: str) -> None:
        self._end(seq)
        self._ended.append(TokenDelta(seq.request.request_id, finish_reason="error", error=message))

    def _is_live(self, seq: Sequence) -> bool:
        return self._live.get(seq.request.request_id) is seq

    def _end(self, seq: Sequence) -> None:
        """Forget a request. What it holds it gives back now or, if it is part of a step under way, after that."""
        del self._live[seq.request.request_id]
        self._unsized.pop(seq.request.request_id, None)
        seq.final = True
        flight = next((flight for flight in self._flights if seq in flight.seqs), None)
        if flight is None:
            self._release(seq)
        else:
            flight.leaving.append(seq)

    def _release(self, seq: Sequence) -> None:
        """Give back all that a request holds, which nothing on the device is at work with."""
        self._scheduler.finish(seq)
        for stream in seq.streams:
            if stream.adapter is not None:
                self._lanes[stream.lane].adapters.drop(stream.adapter)

    @property
    def has_work(self) -> bool:
        """Requests are live, deltas are waiting to be handed out, or a step is under way."""
        return bool(self._live or self._ended or self._flights)

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
        there = [*self._live.values(), *(seq for flight in self._flights for seq in flight.leaving)]
        assert known == {id(seq) for seq in there}, "live requests and the scheduler's disagree"
        streams = [stream for seq in there for stream in seq.streams]
        for model in self._lanes:
            model.adapters.check_integrity()
            holds = Counter(parent for seq in streams if seq.lane == model.lane for parent in seq.parents)
            for version, count in model.adapters.holds().items():
                assert count == holds[version], f"{version} is held {count} times by {holds[version]} live streams"
