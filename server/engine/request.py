"""What is asked of the engine and what it answers: plain data, shared by the offline and the HTTP side."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from weft.adapters.composition import Composition
from weft.server.engine.arithmetic import LogitArithmetic
from weft.server.errors import InvalidRequest

COMPOSED = "__composed__"
"""Compositions without a name of their own are accounted together: there is no end of weightings. No adapter's id."""
MAX_LOGPROBS = 64
"""Upper bound on ``logprobs`` and ``prompt_logprobs``, so that one request cannot ask for a vocabulary per token."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of a request are chosen. Names and meanings follow OpenAI, and vLLM where it extends OpenAI.

    Attributes:
        max_tokens: tokens to generate at most; None: up to the model's context.
        min_tokens: no end-of-sequence or stop token id before this many tokens.
        temperature: 0 is greedy.
        top_k: 0 or -1: off.
        seed: the sampled tokens are a function of (seed, position, logits) alone, whatever else is in the batch.
        stop_token_ids: end the output; kept in ``token_ids``, never in text.
        ignore_eos: do not stop at the model's end-of-sequence ids.
        logit_bias: added to the logits of the token ids.
        logprobs: report the log-probability of each chosen token and of this many most likely ones (0: only the
            chosen); None: none. They are of the model's own distribution, before penalties, bias and temperature.
        prompt_logprobs: likewise for every prompt token but the first.

    Raises:
        InvalidRequest: naming the field.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None, optional=True)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, -1, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidRequest("'stop' must hold non-empty strings", param="stop")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, None)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check_int(name: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"'{name}' must be {bound}, got {value}", param=name)


def _check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be a number, got {value!r}", param=name)
    if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        raise InvalidRequest(f"'{name}' must be in {'(' if low_open else '['}{low}, {high}], got {value}", param=name)


@dataclass(frozen=True)
class EngineRequest:
    """One stream of tokens to generate.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token id.
        adapter: version (content digest) of a registered adapter; None: the base.
        adapter_name: under which its traffic is accounted (fairness, metrics).
        cache_salt: requests with different salts never share KV blocks.
        priority: lower is served earlier.
        choices: what it chooses of its adapter, by name ("task_id", "lora_rank").
        composition: registered adapters weighed against each other, in place of ``adapter``.
        arithmetic: further streams whose logits are added to those of this one.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    adapter_name: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    choices: dict[str, int] = field(default_factory=dict)
    composition: Composition | None = None
    arithmetic: LogitArithmetic | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural logarithm.

    Attributes:
        token_id, logprob, rank: of the token that stands there (rank 1 is the most likely).
        top: the most likely ``(token id, logprob)``, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class TokenDelta:
    """What one step added to one request. ``finish_reason`` set: the last one for it.

    Attributes:
        token_ids: the new tokens; empty where a request ends without one (abort, error).
        logprobs: one per new token, if asked for.
        prompt_logprobs: with the first token, if asked for: one per prompt token, None for the first.
        finish_reason: "stop" (end of sequence or stop id), "length", "abort", "error".
        stop_reason: the stop token id that ended it, if one of ``stop_token_ids`` did.
        error: what went wrong, with ``finish_reason == "error"``.
        cached_tokens: prompt tokens served from the prefix cache, with the first token.
        queue_seconds: from acceptance to the first step it took part in, with the first token.
        compose_seconds: what the weighting step of its composition took, with the first token; 0.0 where that was there
            already, None where there is none.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    compose_seconds: float | None = None
