"""Drives an engine and compares every stream with the adapter run alone by peft."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.support.adapters import PeftReference
from tests.support.models import VOCAB_SIZE
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams, TokenDelta, TokenLogprobs


@dataclass
class Stream:
    """One request and everything the engine said of it."""

    request: EngineRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    last: TokenDelta | None = None

    def take(self, delta: TokenDelta) -> None:
        assert self.last is None, "a delta after the last one"
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is not None:
            self.last = delta


class Driver:
    """Adds requests and steps the engine, with ``tick`` called between steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams: dict[str, Stream] = {}

    def add(
        self, prompt: list[int], adapter: str | None = None, choices: dict[str, int] | None = None, **params: object
    ) -> Stream:
        """A greedy request with log-probabilities, unless ``params`` say otherwise."""
        settings = {"temperature": 0.0, "max_tokens": 10, "logprobs": 2, "ignore_eos": True, **params}
        salt = settings.pop("cache_salt", None)
        request = EngineRequest(
            f"r{len(self.streams)}",
            prompt,
            SamplingParams(**settings),  # type: ignore[arg-type]
            adapter=adapter,
            adapter_name=adapter,
            cache_salt=salt,  # type: ignore[arg-type]
            choices=choices or {},
        )
        self.engine.add(request)
        stream = Stream(request)
        self.streams[request.request_id] = stream
        return stream

    def step(self) -> None:
        deltas = self.engine.step()
        if not deltas:
            self.engine.wait(0.02)
        for delta in deltas:
            self.streams[delta.request_id].take(delta)

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Step until nothing is live; then everything must be in its place."""
        steps = 0
        while self.engine.has_work:
            tick()
            self.step()
            steps += 1
            assert steps < 20_000, "the engine makes no progress"
        self.engine.check_integrity()


def random_prompt(rng: random.Random, low: int = 3, high: int = 45) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(low, high))]


def assert_alone(stream: Stream, oracle: PeftReference, tolerance: float = 1e-3) -> None:
    """The stream's tokens are the greedy ones of the adapter alone, its log-probabilities those of peft."""
    assert stream.last is not None and stream.last.error is None, stream.last
    prompt = stream.request.prompt_token_ids
    logprobs = oracle.logits([*prompt, *stream.tokens], len(prompt)).log_softmax(-1)
    steps = logprobs[len(prompt) - 1 : -1]
    assert stream.tokens == steps.argmax(-1).tolist()
    expected = steps.gather(1, torch.tensor(stream.tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        torch.tensor([entry.logprob for entry in stream.logprobs]), expected, atol=tolerance, rtol=0
    )
    if stream.prompt_logprobs is not None:
        assert stream.prompt_logprobs[0] is None and len(stream.prompt_logprobs) == len(prompt)
        given = torch.tensor([entry.logprob for entry in stream.prompt_logprobs[1:] if entry is not None])
        alone = logprobs[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(given, alone, atol=tolerance, rtol=0)


class Oracles:
    """peft with one adapter alone, by the name the engine knows it under; None: the base.

    Args:
        tasks: of the adapters that need one.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], tasks: Mapping[str, int] | None = None) -> None:
        self._base = base
        self._adapters = adapters
        self._tasks: Mapping[str | None, int] = {**(tasks or {})}
        self._made: dict[str | None, PeftReference] = {}

    def __getitem__(self, name: str | None) -> PeftReference:
        if name not in self._made:
            folder = None if name is None else self._adapters[name]
            self._made[name] = PeftReference(self._base, folder, self._tasks.get(name))
        return self._made[name]
