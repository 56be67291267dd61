"""Stand-ins for the engine and the registry, and a small tokenizer, for tests of the HTTP side alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from weft.adapters.errors import AdapterError
from weft.server.engine.info import AdapterInfo, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta, TokenLogprobs
from weft.server.errors import Conflict, EngineUnavailable, NotFound, RequestError
from weft.server.registry.names import Names
from weft.server.registry.records import AdapterRecord
from weft.server.tokenization import Tokenizer

MAX_MODEL_LEN = 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' and not message.get('tool_call_id') %}"
    "{{ raise_exception('a tool message needs tool_call_id') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{% if shout %}!{% endif %}"
)


def byte_level_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with few merges, so that characters beyond ASCII are several tokens."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(["the quick brown fox jumps over the lazy dog and the cat " * 4], trainer)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def model_info(tokenizer: Tokenizer) -> ModelInfo:
    return ModelInfo(
        model="fake",
        model_type="llama",
        architecture="LlamaForCausalLM",
        fingerprint="0",
        dtype="float32",
        device="cpu",
        vocab_size=len(tokenizer.backend),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(2,),
        num_parameters=1,
        num_blocks=8,
        block_size=16,
        max_num_seqs=8,
        max_adapters=8,
        load_seconds=0.0,
    )


class FakeClient:
    """Answers every request with the tokens of ``output``; keeps what it was asked.

    Attributes:
        output: text, token ids, or a function from the request to either.
        fail: raised before the first delta. fail_after: (tokens, error) raised in mid-stream.
        loss: of every prompt token, in place of what ``logprob`` says.
        gate: when set, each token waits for it.
        requests, aborted, finished: what came, and how it ended. holding: ids of the adapters that came with each.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.info = model_info(tokenizer)
        self.ready = True
        self.unready_reason: str | None = None
        self.stats = EngineStats()
        self.lives = 1
        self.on_stats: list[Callable[[EngineStats, int], None]] = []
        self.output: Any = "the quick brown fox"
        self.fail: RequestError | None = None
        self.fail_after: tuple[int, RequestError] | None = None
        self.finish: tuple[str, str | None] | None = None
        self.logprob: Callable[[int], float] = lambda token_id: -float(token_id) / 7
        self.loss: Callable[[EngineRequest], float] | None = None
        self.gate: asyncio.Semaphore | None = None
        self.cached_tokens = 0
        self.requests: list[EngineRequest] = []
        self.holding: dict[str, tuple[str, ...]] = {}
        self.aborted: list[str] = []
        self.finished: list[str] = []

    async def refresh_stats(self) -> EngineStats:
        return self.stats

    def _output(self, request: EngineRequest) -> list[int]:
        output = self.output(request) if callable(self.output) else self.output
        return self.tokenizer.encode(output, add_special_tokens=False) if isinstance(output, str) else list(output)

    def _logprobs(self, token_id: int, top: int | None) -> TokenLogprobs | None:
        if top is None:
            return None
        best = [(i, self.logprob(i)) for i in range(top)]
        return TokenLogprobs(token_id, self.logprob(token_id), token_id + 1, best)

    async def generate(self, request: EngineRequest, ids: Collection[str] = ()) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.holding[request.request_id] = tuple(ids)
        if not self.ready:
            raise EngineUnavailable("the engine is restarting")
        if self.fail is not None:
            raise self.fail
        done = False
        try:
            async for delta in self._deltas(request):
                done = delta.finish_reason is not None
                yield delta
        finally:
            (self.finished if done else self.aborted).append(request.request_id)

    async def _deltas(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        params, output = request.params, self._output(request)
        limit = params.max_tokens or MAX_MODEL_LEN - len(request.prompt_token_ids)
        ended = len(output) < limit
        output = [*output, 2] if ended else output[:limit]
        prompt = None
        if params.prompt_logprobs is not None:
            prompt = [None, *(self._logprobs(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:])]
            if self.loss is not None:
                loss = self.loss(request)
                prompt = [entry and replace(entry, logprob=-loss) for entry in prompt]
        for position, token_id in enumerate(output):
            if self.gate is not None:
                await self.gate.acquire()
            await asyncio.sleep(0)
            if self.fail_after is not None and position == self.fail_after[0]:
                raise self.fail_after[1]
            last = position == len(output) - 1
            finish: str | None = ("stop" if ended else "length") if last else None
            error = None
            if last and self.finish is not None:
                finish, error = self.finish
            entry = self._logprobs(token_id, params.logprobs)
            yield TokenDelta(
                request.request_id,
                [token_id],
                logprobs=None if entry is None else [entry],
                prompt_logprobs=prompt if position == 0 else None,
                finish_reason=finish,
                error=error,
                cached_tokens=self.cached_tokens if position == 0 else 0,
                compose_seconds=0.0025 if position == 0 and request.composition else None,
            )


class FakeRegistry:
    """Ids in a dictionary. A source that has "broken" in it is a broken adapter."""

    kind = "adapter"

    def __init__(self, base_names: tuple[str, ...] = ("base",)) -> None:
        self.names = Names(base_names)
        self.names.join(self)
        self.records: dict[str, AdapterRecord] = {}
        self.leases: list[str] = []
        self.forced: list[float | None] = []
        self.on_unloaded: list[Callable[[str], None]] = []

    def add(self, id: str, version: str = "v1") -> AdapterRecord:
        info = AdapterInfo(version, "LORA", ("LowRank",), 8, 12, 4096)
        self.records[id] = AdapterRecord(id, version, f"/adapters/{id}", False, int(time.time()), info, "ready")
        return self.records[id]

    async def load(self, id: str, source: str, *, pinned: bool = False, base: str | None = None) -> AdapterRecord:
        self.names.check_free(id)
        if "broken" in source:
            raise AdapterError("tensor 'x' is missing", param="x")
        return self._put(replace(self.add(id), source=source, pinned=pinned, base=base))

    async def replace(
        self, id: str, source: str, *, pinned: bool | None = None, if_match: str | None = None
    ) -> AdapterRecord:
        old = self.get(id)
        if if_match is not None and if_match != old.version:
            raise Conflict("another version", param="if_match", code="precondition_failed")
        new = replace(old, source=source, version=old.version + "+")
        return self._put(new if pinned is None else replace(new, pinned=pinned))

    async def unload(self, id: str, *, force_after: float | None = None) -> None:
        self.get(id)
        self.forced.append(force_after)
        del self.records[id]
        for hook in self.on_unloaded:
            hook(id)

    def get(self, id: str) -> AdapterRecord:
        if id not in self.records:
            raise NotFound(f"adapter {id!r} is not served", param="model")
        return self.records[id]

    def ids(self) -> list[str]:
        return [*self.records]

    def describe(self, id: str) -> str | None:
        return f"adapter {id!r} exists already" if id in self.records else None

    def list(self) -> list[AdapterRecord]:
        return list(self.records.values())

    @contextmanager
    def lease(self, id: str) -> Iterator[AdapterRecord]:
        record = self.get(id)
        self.leases.append(id)
        try:
            yield record
        finally:
            self.leases.remove(id)

    def _put(self, record: AdapterRecord) -> AdapterRecord:
        self.records[record.id] = record
        return record
