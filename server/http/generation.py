"""The core of both kinds of completion: resolve the model, tokenize, ask the engine, bring the streams together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

from weft.server.engine.info import ModelInfo
from weft.server.engine.request import EngineRequest, SamplingParams, TokenLogprobs
from weft.server.engine.streams import TextDelta, TextStream
from weft.server.engine.variants import resolve
from weft.server.errors import EngineUnavailable, InvalidRequest
from weft.server.http.arithmetic import Asked, Encode, Steering, check_terms, steered_by, steering
from weft.server.http.resolution import Resolved, Wanted, leased
from weft.server.http.state import ServerState
from weft.server.http.timing import observed

MERGE_BUFFER = 64
"""Deltas that may wait between the streams of one request and its reply."""

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a request asks for.

    Attributes:
        request_id: of the reply; the engine's requests are numbered under it.
        wanted: what it names to run with. asked: further streams whose logits are added; None: none.
        render: its messages, as a tokenizer's own template renders them; None: it has none.
        encode: makes the prompts' token ids; run in a thread.
        prompt_param: the field the prompts come from.
        choices: what is chosen of the adapter, by name.
        no_output: no token is wanted, only what is known of the prompt. One is generated, since that is the least the
            engine does, and dropped.
    """

    request_id: str
    wanted: Wanted
    asked: Asked | None
    encode: Callable[[], list[list[int]]]
    prompt_param: str
    params: SamplingParams
    n: int = 1
    no_output: bool = False
    skip_special_tokens: bool = True
    cache_salt: str | None = None
    priority: int = 0
    choices: dict[str, int] = field(default_factory=dict)
    render: Encode | None = None
    arrived: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; each prompt counts once, however many choices it has.

    Attributes:
        compose_seconds: what weighing its adapters took; 0.0 where that was done before, None where it composes none.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    compose_seconds: float | None = None


class Generation:
    """A request under way.

    Attributes:
        prompts: token ids by prompt.
        size: choices in all; choice ``i`` is of prompt ``i // n``.
    """

    def __init__(
        self,
        state: ServerState,
        plan: Plan,
        prompts: list[list[int]],
        runs: Resolved,
        steered: Steering | None = None,
    ) -> None:
        self.plan = plan
        self.prompts = prompts
        self.size = len(prompts) * plan.n
        self._state = state
        self._runs = runs
        self._steered = steered
        self._completion_tokens = 0
        self._cached = [0] * len(prompts)
        self._compose_seconds: float | None = None

    def prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self.plan.n]

    @property
    def usage(self) -> Usage:
        """Of what there is so far."""
        return Usage(sum(map(len, self.prompts)), self._completion_tokens, sum(self._cached), self._compose_seconds)

    async def pieces(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """The deltas of all choices, each with its choice's index. Raises ``RequestError``."""
        streams = [self._choice(index) for index in range(self.size)]
        async with aclosing(merged(streams)) as pieces:
            async for index, delta in pieces:
                self._completion_tokens += len(delta.token_ids)
                if delta.cached_tokens and index % self.plan.n == 0:
                    self._cached[index // self.plan.n] = delta.cached_tokens
                yield index, delta

    async def collect(self) -> list[TextDelta]:
        """Every choice in one piece. Raises ``RequestError``."""
        parts: list[list[TextDelta]] = [[] for _ in range(self.size)]
        async with aclosing(self.pieces()) as pieces:
            async for index, delta in pieces:
                parts[index].append(delta)
        return [joined(deltas) for deltas in parts]

    async def _choice(self, index: int) -> AsyncGenerator[TextDelta, None]:
        request = self._request(index)
        text = TextStream(
            self._state.tokenizer,
            request.prompt_token_ids,
            request.params,
            skip_special_tokens=self.plan.skip_special_tokens,
        )
        prompt_tokens = len(request.prompt_token_ids)
        times_of = observed(self._state.metrics, request.adapter_name, prompt_tokens, self.plan.arrived)
        ids: tuple[str, ...] = self._runs.ids
        naming: AbstractContextManager[None] = nullcontext()
        if self._steered is not None:
            ids, naming = self._steered.ids, self._steered.naming()
        with times_of as times, self._runs.naming(), naming:
            async with aclosing(self._state.client.generate(request, ids=ids)) as deltas:
                async for delta in deltas:
                    piece = text.push(delta)
                    if piece.finish_reason in ("abort", "error"):
                        reason = piece.error or "the request was aborted"
                        raise EngineUnavailable(reason, code=f"request_{piece.finish_reason}")
                    if delta.queue_seconds is not None:
                        times.queue = delta.queue_seconds
                    if delta.compose_seconds is not None:
                        times.compose = delta.compose_seconds
                        self._compose_seconds = (self._compose_seconds or 0.0) + delta.compose_seconds
                    times.mark(len(piece.token_ids), piece.finish_reason)
                    yield _without_output(piece) if self.plan.no_output else piece
                    if text.stopped:
                        return  # closing the deltas aborts the engine's request

    def _request(self, index: int) -> EngineRequest:
        plan, choice = self.plan, index % self.plan.n
        params = plan.params
        if params.seed is not None and choice:
            # Choices of one prompt differ; the first is that of the seed alone.
            params = replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
        return EngineRequest(
            request_id=f"{plan.request_id}-{index}",
            prompt_token_ids=self.prompt_of(index),
            params=params,
            adapter=self._runs.adapter,
            adapter_name=self._runs.name,
            cache_salt=plan.cache_salt,
            priority=plan.priority,
            choices=plan.choices,
            composition=self._runs.composition,
            arithmetic=self._steered.arithmetic if self._steered else None,
        )


@asynccontextmanager
async def opened(state: ServerState, plan: Plan) -> AsyncIterator[Generation]:
    """A generation, with what it runs with held until the end. Raises ``RequestError``."""
    info = state.client.info
    with ExitStack() as held:
        runs, steered = leased_streams(state, plan, held)
        prompts = await state.workers.run(plan.encode)
        check_prompts(plan, prompts, info, state.limits.max_sequences, steered.streams if steered else 1)
        if steered is not None:
            steered = await state.workers.run(steered.encoded)
            check_terms(steered, prompts, plan.params.max_tokens, info)
        yield Generation(state, plan, prompts, runs, steered)


def leased_streams(state: ServerState, plan: Plan, held: ExitStack) -> tuple[Resolved, Steering | None]:
    """What a request runs with, and the further streams it asks for or the proxy it names has. ``RequestError``."""
    proxy, asked = state.proxies.find(plan.wanted.model), plan.asked
    if proxy is None:
        runs = leased(state, plan.wanted, held)
        resolve(runs.choices, plan.choices)
        return runs, None if asked is None else steering(state, asked, runs, plan.choices, plan.render, held)
    if asked is not None:
        message = f"'model' {proxy.id!r} is a proxy itself, and there are no proxies of proxies"
        raise InvalidRequest(message, param=asked.field)
    if plan.wanted.members:
        raise InvalidRequest(f"with 'adapters', 'model' must be the base, {state.base_name!r}", param="model")
    runs, steered = steered_by(state, proxy, plan.choices, plan.render, held)
    return replace(runs, name=proxy.id), steered


def check_prompts(
    plan: Plan, prompts: Sequence[Sequence[int]], info: ModelInfo, max_sequences: int, streams: int = 1
) -> None:
    """Refuse, with ``InvalidRequest``, what the engine could not serve. ``streams``: of each sequence."""
    if len(prompts) * plan.n * streams > max_sequences:
        of_streams = f" and of the {streams} streams of each" if streams > 1 else ""
        message = f"'n' times the number of prompts{of_streams} must be at most {max_sequences}"
        raise InvalidRequest(message, param="n")
    if any(token_id >= info.vocab_size for token_id in plan.params.stop_token_ids):
        raise InvalidRequest(f"'stop_token_ids' must be below {info.vocab_size}", param="stop_token_ids")
    if any(token_id >= info.vocab_size for token_id in plan.params.logit_bias):
        raise InvalidRequest(f"the keys of 'logit_bias' must be below {info.vocab_size}", param="logit_bias")
    for prompt in prompts:
        _check_prompt(plan, prompt, info)


def _check_prompt(plan: Plan, prompt: Sequence[int], info: ModelInfo) -> None:
    param = plan.prompt_param
    if not prompt:
        raise InvalidRequest(f"'{param}' has no tokens", param=param)
    if max(prompt) >= info.vocab_size:
        raise InvalidRequest(f"'{param}' has token id {max(prompt)}, not below {info.vocab_size}", param=param)
    wanted = plan.params.max_tokens
    total = len(prompt) + (1 if wanted is None else wanted)
    if total > info.max_model_len:
        # The wording is that of OpenAI and vLLM, which clients look for.
        raise InvalidRequest(
            f"This model's maximum context length is {info.max_model_len} tokens. However, you requested {total} "
            f"tokens ({len(prompt)} in the prompt, {total - len(prompt)} for the completion). "
            f"Shorten '{param}' or lower 'max_tokens'.",
            param=param if len(prompt) >= info.max_model_len or wanted is None else "max_tokens",
            code="context_length_exceeded",
        )


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """The deltas of one choice as one."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    last = deltas[-1]
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for part in logprobs for entry in part] if logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        offsets=[offset for delta in deltas for offset in delta.offsets],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _without_output(piece: TextDelta) -> TextDelta:
    logprobs: list[TokenLogprobs] | None = None if piece.logprobs is None else []
    return TextDelta("", [], logprobs, prompt_logprobs=piece.prompt_logprobs, finish_reason="length")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they come, each with its stream's index. One error ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for single in only:
                yield 0, single
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(MERGE_BUFFER)

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
