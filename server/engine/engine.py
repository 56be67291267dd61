"""The engine: takes requests, runs steps, hands out tokens. One thread calls it; nothing here knows of HTTP."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter
from weft.adapters.quantized import count_parameters
from weft.server.config import EngineConfig
from weft.server.engine import startup
from weft.server.engine.batch import Batch
from weft.server.engine.blocks import BlockPool, root_key
from weft.server.engine.counters import Counters
from weft.server.engine.info import AdapterInfo, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.engine.sampler import Sample, Sampler
from weft.server.engine.scheduler import Row, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.variants import RunsWith, Variants, last_occurrence
from weft.server.errors import InvalidRequest, Overloaded


class Engine:
    """One frozen base model and the requests on it.

    Methods belong to one thread, but for those that say "any thread".

    Args:
        progress: told what start-up is busy with.

    Raises:
        ConfigError: the model or a setting cannot be honoured.
    """

    def __init__(self, config: EngineConfig, *, progress: startup.Progress | None = None) -> None:
        started = time.perf_counter()
        loaded = startup.load(config, progress or (lambda stage: None))
        self.config = config
        self.adapters = loaded.adapters
        self.runner = loaded.runner
        self._variants = Variants(loaded.adapters, loaded.compile_folder)
        self._blocks = BlockPool(loaded.runner.cache.num_blocks)
        self._scheduler = Scheduler(config, self._blocks, loaded.adapters)
        self._sampler = Sampler(loaded.eos_token_ids)
        self._counters = Counters()
        self._live: dict[str, Sequence] = {}
        self._ended: list[TokenDelta] = []
        self.info = _describe(config, loaded, time.perf_counter() - started)

    def add(self, request: EngineRequest) -> None:
        """Accept a request; from now on it gets tokens and exactly one last delta.

        Raises:
            InvalidRequest: naming the field. NotFound: its adapter is not registered. Overloaded: the queue is full.
        """
        runs = self._variants.find(request.adapter, request.composition, request.choices)
        max_len = self._check(request, runs.outline)
        if len(self._scheduler.waiting) >= self.config.max_queued_requests:
            raise Overloaded(f"{len(self._scheduler.waiting)} requests are waiting already")
        self._variants.hold(runs)
        seq = self._sequence(request, runs, max_len)
        self._live[request.request_id] = seq
        self._scheduler.add(seq)
        self._counters.accepted(seq)

    def _sequence(self, request: EngineRequest, runs: RunsWith, max_len: int) -> Sequence:
        """A request on what it runs with, which works from its invocation on, if it has one."""
        outline = runs.outline
        root = root_key(self.info.fingerprint, runs.identity, request.cache_salt)
        seq = Sequence.start(request, root, max_len, outline.prompt if outline else None)
        seq.adapter, seq.parents = runs.identity, runs.parents
        seq.whole_prompt = outline is not None and outline.whole_prompts
        if runs.identity is not None and outline is not None and outline.invocation:
            seq.root = root_key(self.info.fingerprint, None, request.cache_salt)
            activation = last_occurrence(request.prompt_token_ids, outline.invocation)
            if activation is None:  # it is not invoked
                self.adapters.drop(runs.identity)
                seq.adapter, seq.parents = None, ()
            else:
                seq.activation, seq.active_root = activation, root
        return seq

    def abort(self, request_id: str) -> None:
        """End a request, if it is live; the next step's deltas hold its last one."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq)
            self._ended.append(TokenDelta(request_id, finish_reason="abort"))

    def step(self) -> list[TokenDelta]:
        """One forward pass over whatever can run, or none while all wait for adapters to arrive."""
        self.poll()
        deltas = []
        rows = self._scheduler.schedule()
        for blocks, prefix in self._scheduler.prompts.take_unwritten():
            self.runner.write_prefix(blocks, prefix)
        if rows:
            batch = Batch.build(rows, self.config.block_size, self.runner.device)
            logits = self.runner.forward(batch)
            samples = self._sampler.sample(logits, batch)
            deltas = self._commit(rows, samples)
            self._counters.stepped(batch)
        ended, self._ended = self._ended, []
        return ended + deltas

    def poll(self) -> None:
        """Take in adapters that have arrived and forget those unregistered; ``step`` does so too.

        Requests for an adapter that could not be loaded end with its error.
        """
        for version, error in self.adapters.poll():
            for seq in [s for s in self._live.values() if s.adapter == version]:
                self._fail(seq, str(error))
        self._scheduler.prompts.prune(self.adapters.knows)
        if self.runner.side.prune(self.adapters.knows):
            # Were such an adapter to come again, it would find pages of which a part is gone.
            self._blocks.forget(range(self.info.num_blocks))

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
        seq.tokens.append(token)
        self._counters.generated(seq)
        finish, stop = self._finish_reason(seq, token)
        if finish is not None:
            self._end(seq)
        return TokenDelta(
            seq.request.request_id,
            [token],
            logprobs=[sample.logprobs] if sample.logprobs is not None else None,
            prompt_logprobs=seq.prompt_logprobs if first else None,
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
        self.runner.scrub(self._blocks.exclusive(seq.blocks))
        self._blocks.forget(seq.blocks)
        self._fail(seq, "the model's output is not a number (NaN or infinity)")

    def _fail(self, seq: Sequence, message: str) -> None:
        self._end(seq)
        self._ended.append(TokenDelta(seq.request.request_id, finish_reason="error", error=message))

    def _end(self, seq: Sequence) -> None:
        """Forget a request and give back all it holds."""
        self._scheduler.finish(seq)
        del self._live[seq.request.request_id]
        if seq.adapter is not None:
            self.adapters.drop(seq.adapter)

    @property
    def has_work(self) -> bool:
        """Requests are live, or deltas are waiting to be handed out."""
        return bool(self._live or self._ended)

    def register_adapter(self, version: str, folder: Path) -> AdapterInfo:
        """Read, check and compile an adapter; requests may name its version afterwards. Slow; any thread.

        Raises:
            AdapterError: why it cannot be served; nothing is left behind.
        """
        adapter = self.adapters.register(version, folder)
        try:
            self.runner.side.admit(adapter)
        except AdapterError:
            self.adapters.unregister(version)
            raise
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
        )

    def unregister_adapter(self, version: str) -> None:
        """Forget an adapter once no live request holds it. Any thread; takes effect at the next ``poll``."""
        self.adapters.unregister(version)

    def pin_adapters(self, versions: Iterable[str]) -> None:
        """Keep these versions, and no others, on the device whether they are used or not. Any thread.

        Raises:
            AdapterTooLarge: some other adapter would then never find room.
        """
        self.adapters.pin(versions)

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        return self._counters.snapshot(self._scheduler, self.adapters)

    def close(self) -> None:
        """Stop the background loader."""
        self.adapters.close()

    def check_integrity(self) -> None:
        """Pages, slots, queues and reference counts agree.

        Raises:
            AssertionError: saying what does not hold.
        """
        self._scheduler.check_integrity(self.adapters.pins)
        self.adapters.check_integrity()
        known = {id(seq) for seq in (*self._scheduler.running, *self._scheduler.waiting)}
        assert known == {id(seq) for seq in self._live.values()}, "live requests and the scheduler's disagree"
        holds = Counter(parent for seq in self._live.values() for parent in seq.parents)
        for version, count in self.adapters.holds().items():
            assert count == holds[version], f"{version} is held {count} times by {holds[version]} live requests"

    def _check(self, request: EngineRequest, outline: CompiledAdapter | None) -> int:
        """Refuse what cannot be served; returns the tokens of prompt and output at most."""
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        ids, params, limit = request.prompt_token_ids, request.params, self.info.max_model_len
        for field, tokens in (
            ("prompt", ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            self._check_tokens(field, tokens)
        if not ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if outline is not None and outline.whole_prompts and len(ids) > self.config.max_num_batched_tokens:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; this model computes a prompt in one pass, of at most "
                f"{self.config.max_num_batched_tokens} tokens: raise --max-num-batched-tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        prompt = outline.prompt if outline else None
        own = prompt.length if prompt else 0
        if own % self.info.block_size:
            # The page that the adapter's prompt ends in is copied for every row, and must fit beside the copy.
            limit = min(limit, (self.info.num_blocks - 1) * self.info.block_size)
        room = limit - own - len(ids)
        if room < 1:
            beside = f" beside the adapter's own {own}" if own else ""
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; with one to generate, {limit - own - 1} fit the context of {limit}"
                f"{beside}",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"'max_tokens' is {params.max_tokens}, but a prompt of {len(ids)} tokens leaves {room} of {limit}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return len(ids) + (params.max_tokens or room)

    def _check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        size = self.info.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequest(f"'{field}' has token id {wrong}, outside the vocabulary of {size}", param=field)


def _describe(config: EngineConfig, loaded: startup.Loaded, seconds: float) -> ModelInfo:
    model, cache = loaded.runner.model, loaded.runner.cache
    return ModelInfo(
        model=config.model,
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        fingerprint=loaded.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(loaded.runner.device),
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        eos_token_ids=loaded.eos_token_ids,
        num_parameters=count_parameters(model),
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        max_num_seqs=config.max_num_seqs,
        max_adapters=config.max_adapters,
        load_seconds=seconds,
    )
