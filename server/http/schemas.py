"""The bodies of requests to the models: strict types, bounds, no unknown fields (but see ``unserved``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from weft.adapters.composition import Combination
from weft.server.engine.request import MAX_LOGPROBS, SamplingParams
from weft.server.errors import InvalidRequest
from weft.server.http.arithmetic import Asked, Encode
from weft.server.http.members import WeighedAdapters, weighed_ids
from weft.server.http.messages import Body, Messages, TemplateOptions, text_kind
from weft.server.http.resolution import Wanted
from weft.server.http.steering import NUCLEUS, ProxyBody, TermBody, Terms, TopP, asked_terms
from weft.server.http.unserved import drop_neutral

MAX_N = 128
MAX_PROMPTS = 1024
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_IDS = 4096
"""Entries of ``logit_bias`` and of ``stop_token_ids``."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _prompt_kind(value: object) -> str | None:
    """Which branch of ``Prompt`` a value is of, by its first element: one branch's errors, not those of all four."""
    if isinstance(value, str):
        return "(text)"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "(texts)" if isinstance(first, str) else "(batch)" if isinstance(first, list) else "(tokens)"


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(tokens)")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("(batch)")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


Stop = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[str], Field(max_length=MAX_STOPS), Tag("(list)")],
    Discriminator(text_kind),
]


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class Generation(Body):
    """What both kinds of completion share."""

    model: str = Field(
        min_length=1, max_length=1024, description="The base's name, or the id of an adapter or a composition."
    )
    adapters: WeighedAdapters | None = Field(
        None, description="Composed for this request alone; 'model' is then the base."
    )
    combination: Combination | None = Field(
        None, description="Of 'adapters': lorahub, (Σ w B)(Σ w A), the default; or linear, Σ w ΔW."
    )
    proxy: ProxyBody | None = Field(
        None, description="Proxy-tuning: the logits are s + alpha (s_expert - s_anti_expert)."
    )
    logit_arithmetic: Terms | None = Field(
        None,
        description="The logits are s + Σ weight · s_term; a term of nothing but a weight is the request's own stream.",
    )
    base_top_p: TopP | None = Field(None, description=f"With 'logit_arithmetic'. {NUCLEUS}")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices per prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_IDS, description="Added to the logits; keys are token ids in decimal."
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="Lower is served earlier.")
    task_id: int | None = Field(None, ge=0, lt=2**31, description="Of adapters for several tasks.")
    lora_rank: int | None = Field(None, ge=1, lt=2**31, description="Of adapters that work at several ranks.")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return drop_neutral(body)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        for text in [stop] if isinstance(stop, str) else stop or []:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"'stop' must hold strings of 1 to {MAX_STOP_CHARS} characters", param="stop")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not re.fullmatch(r"[0-9]{1,10}", key):
                raise InvalidRequest(f"'logit_bias' has the key {key[:32]!r}, no token id", param="logit_bias")
        return bias

    @model_validator(mode="after")
    def _check_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("'prompt_logprobs' cannot be streamed", param="prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_combination(self) -> Generation:
        if self.combination is not None and self.adapters is None:
            raise InvalidRequest("'combination' needs 'adapters'", param="combination")
        return self

    @model_validator(mode="after")
    def _check_steering(self) -> Generation:
        if self.proxy is not None and self.logit_arithmetic is not None:
            raise InvalidRequest("'proxy' is a shorthand for 'logit_arithmetic': give one of them", param="proxy")
        if self.base_top_p is not None and self.logit_arithmetic is None:
            message = "'base_top_p' needs 'logit_arithmetic'; of a proxy it stands inside 'proxy'"
            raise InvalidRequest(message, param="base_top_p")
        return self

    def wanted(self) -> Wanted:
        """What the request names to run with."""
        return Wanted(self.model, weighed_ids(self.adapters or ()), self.combination or "lorahub")

    def asked(self, encode: Callable[[TermBody], Encode | None]) -> Asked | None:
        """The logit arithmetic it asks for. ``encode``: how a term's own prompt becomes token ids."""
        if self.proxy is not None:
            return self.proxy.asked()
        if self.logit_arithmetic is not None:
            return asked_terms(self.logit_arithmetic, self.base_top_p, encode)
        return None

    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def adapter_choices(self) -> dict[str, int]:
        """What the request chooses of its adapter."""
        given = {"task_id": self.task_id, "lora_rank": self.lora_rank}
        return {name: value for name, value in given.items() if value is not None}

    def sampling(self, **own: Any) -> SamplingParams:
        """The engine's parameters; ``own`` are those that the kinds of completion name differently."""
        names = (
            "min_tokens, temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, "
            "seed, include_stop_str_in_output, ignore_eos, prompt_logprobs"
        )
        given = {name: value for name in names.split(", ") if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        return SamplingParams(
            **{**given, "stop": stop, "logit_bias": bias, "stop_token_ids": tuple(self.stop_token_ids or ()), **own}
        )


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    prompt: Prompt
    echo: bool | None = Field(None, description="The prompt in front of the text.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="Must equal n.")
    add_special_tokens: bool | None = Field(None, description="With the tokens the model expects around a text.")

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.choices():
            raise InvalidRequest("'best_of' must equal 'n': weft ranks no candidates", param="best_of")
        return self


class ChatBody(Generation, TemplateOptions):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="Goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
