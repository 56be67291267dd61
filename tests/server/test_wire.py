"""Messages and errors arrive as what they were."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterMismatch, AdapterTooLarge
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine.info import AdapterInfo, AdapterStats, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, SamplingParams, TokenDelta, TokenLogprobs
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, NotFound, Overloaded, RequestError
from weft.server.observability.logs import LogConfig
from weft.server.runtime import wire

text = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(0, 2**40)
token_ids = st.lists(st.integers(0, 2**31), max_size=5)
floats = st.floats(allow_nan=False)  # NaN is not equal to itself; infinities must pass

params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(100, 1000),
    min_tokens=st.integers(0, 100),
    temperature=st.floats(0, 100) | st.integers(0, 100),
    top_k=st.integers(-1, 2**60),
    top_p=st.floats(0.01, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(text.filter(bool), max_size=3).map(tuple),
    stop_token_ids=token_ids.map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 64),
)
requests = st.builds(
    EngineRequest,
    text,
    token_ids,
    params,
    adapter=st.none() | text,
    adapter_name=st.none() | text,
    cache_salt=st.none() | text,
    priority=st.integers(-100, 100),
)
logprobs = st.builds(TokenLogprobs, numbers, floats, numbers, st.lists(st.tuples(numbers, floats), max_size=3))
deltas = st.builds(
    TokenDelta,
    text,
    token_ids,
    logprobs=st.none() | st.lists(logprobs, max_size=2),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3),
    finish_reason=st.none() | st.sampled_from(["stop", "length", "abort", "error"]),
    stop_reason=st.none() | numbers,
    error=st.none() | text,
    cached_tokens=numbers,
)
stats = st.builds(
    EngineStats,
    running=numbers,
    adapters=st.dictionaries(text, st.builds(AdapterStats, running=numbers, generation_tokens=numbers), max_size=3),
    tiers=st.dictionaries(text, st.sampled_from(["device", "host"]), max_size=3),
    load_seconds_sum=floats,
)
errors = st.builds(wire.WireError, st.lists(text, max_size=3).map(tuple), text)
calls = st.integers(0, 2**60)
infos = st.builds(AdapterInfo, text, text, st.lists(text, max_size=2).map(tuple), numbers, numbers, numbers)
models = st.builds(ModelInfo, *[text] * 6, *[numbers] * 2, token_ids.map(tuple), *[numbers] * 5, floats)

commands = st.one_of(
    st.builds(wire.Boot, st.builds(EngineConfig, text), st.just(LogConfig("debug", "json"))),
    st.builds(wire.Submit, requests),
    st.builds(wire.Abort, text),
    st.builds(wire.Register, calls, text, text),
    st.builds(wire.Unregister, calls, text),
    st.builds(wire.Refresh, calls),
)
events = st.one_of(
    st.builds(wire.Progress, text),
    st.builds(wire.Started, models),
    st.builds(wire.Failed, errors),
    st.builds(wire.Deltas, st.lists(deltas, max_size=3)),
    st.builds(wire.Refused, text, errors),
    st.builds(wire.Registered, calls, infos),
    st.builds(wire.Done, calls),
    st.builds(wire.CallFailed, calls, errors),
    st.builds(wire.Snapshot, stats, st.none() | calls),
)


@given(commands)
def test_commands_round_trip(command: wire.Command) -> None:
    assert wire.decode_command(wire.encode(command)) == command


@given(events)
def test_events_round_trip(event: wire.Event) -> None:
    assert wire.decode_event(wire.encode(event)) == event


def test_an_event_is_no_command() -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_command(wire.encode(wire.Deltas([])))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("plain", param="p"),
        InvalidRequest("no such field", param="temperature", code="weird"),
        NotFound("no adapter", param="model"),
        Conflict("taken", code="precondition_failed"),
        Overloaded("busy", retry_after=17),
        EngineUnavailable("gone"),
        AdapterError("broken"),
        AdapterFormatError("truncated", param="adapter_model.safetensors"),
        AdapterMismatch("wrong shape: ‖x‖ × 2", param="lora_A"),
        AdapterTooLarge("too large"),
        ConfigError("bad model"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_what_they_were(error: Exception) -> None:
    arrived = pass_over(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error) and arrived.args == error.args
    for name in ("message", "param", "code", "retry_after"):
        assert getattr(arrived, name, None) == getattr(error, name, None)


def test_a_class_unknown_here_arrives_as_the_nearest_known_one() -> None:
    class Elsewhere(AdapterMismatch):
        code = "very_special"

        def __init__(self, tensor: str, expected: int, got: int) -> None:
            super().__init__(f"{tensor}: {got}, not {expected}", param=tensor)

    sent = wire.encode(wire.CallFailed(1, wire.WireError.of(Elsewhere("lora_A", 8, 4))))
    renamed = sent.replace(b"Elsewhere", b"Elsewhen!")  # a class this process has never heard of
    event = wire.decode_event(renamed)
    assert isinstance(event, wire.CallFailed)
    arrived = event.error.exception()
    assert type(arrived) is AdapterMismatch
    assert (arrived.message, arrived.param, arrived.code) == ("lora_A: 4, not 8", "lora_A", "very_special")


def test_an_unexpected_error_arrives_as_remote_error() -> None:
    arrived = pass_over(ZeroDivisionError("division by zero"))
    assert type(arrived) is wire.RemoteError
    assert str(arrived) == "ZeroDivisionError: division by zero"


def pass_over(error: Exception) -> Exception:
    event = wire.decode_event(wire.encode(wire.CallFailed(1, wire.WireError.of(error))))
    assert isinstance(event, wire.CallFailed)
    return event.error.exception()
