"""The bodies of requests to the models: strict types, bounds, no unknown fields (but see ``unserved``)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from weft.server.engine.request import MAX_LOGPROBS, SamplingParams
from weft.server.errors import InvalidRequest
from weft.server.http.unserved import drop_neutral

MAX_N = 128
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
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


def _text_kind(value: object) -> str:
    return "(list)" if isinstance(value, list) else "(text)"


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
    Discriminator(_text_kind),
]


class Body(BaseModel):
    """What every body keeps to."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class Generation(Body):
    """What both kinds of completion share."""

    model: str = Field(min_length=1, max_length=1024, description="The base's name or an adapter's id.")
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


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("(list)")],
    Discriminator(_text_kind),
]


class FunctionCall(Body):
    """What an assistant's message called."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, message: object) -> object:
        # Clients send back what they were given, empty fields included.
        empty = {"annotations", "audio", "function_call", "reasoning_content", "refusal"}
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if value or key not in empty}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequest(f"'messages' has one of role {self.role!r} without 'content'", param="messages")
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest("'messages' has 'tool_calls' in one that is not an assistant's", param="messages")
        return self

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text content, arguments of calls as objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.text()}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateOptions(Body):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's message; default true.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message; default false.")
    add_special_tokens: bool | None = Field(
        None, description="With the tokens the model expects around a text; default true for text, false for messages."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)

    @model_validator(mode="after")
    def _check_continue(self) -> TemplateOptions:
        if self.continue_final_message and self.add_generation_prompt:
            message = "'continue_final_message' and 'add_generation_prompt' exclude each other"
            raise InvalidRequest(message, param="continue_final_message")
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


def _arguments(written: str) -> Any:
    try:
        return orjson.loads(written or "{}")
    except orjson.JSONDecodeError as error:
        message = "'arguments' of a tool call in 'messages' must be JSON"
        raise InvalidRequest(message, param="messages") from error
