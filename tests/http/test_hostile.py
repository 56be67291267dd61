"""Hostile requests: a 4xx that names the field, and never a 5xx."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.conftest import ADMIN, Serve, Served
from tests.http.fakes import MAX_MODEL_LEN, byte_level_tokenizer
from weft.server.errors import Overloaded
from weft.server.http.schemas import ChatBody, CompletionBody
from weft.server.http.state import HttpLimits
from weft.server.http.unserved import IGNORED, NEUTRAL
from weft.server.tokenization import Tokenizer, Workers

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "hi"}]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


BAD_FIELDS: list[tuple[str, Any, str]] = [
    # field, value, what the error's param begins with
    ("model", "", "model"),
    ("model", None, "model"),
    ("model", 5, "model"),
    ("model", "x" * 2000, "model"),
    ("n", True, "n"),
    ("n", "3", "n"),
    ("n", 0, "n"),
    ("n", 129, "n"),
    ("n", 1.0, "n"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"),
    ("temperature", 1e308, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.5, "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 0.5, "top_k"),
    ("min_p", -1, "min_p"),
    ("presence_penalty", 3, "presence_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("seed", 2**70, "seed"),
    ("seed", 2**63, "seed"),
    ("seed", "1", "seed"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 2**70, "max_tokens"),
    ("max_tokens", MAX_MODEL_LEN, "max_tokens"),
    ("min_tokens", 20, "min_tokens"),
    ("stop", "", "stop"),
    ("stop", [""], "stop"),
    ("stop", ["x"] * 33, "stop"),
    ("stop", "x" * 1025, "stop"),
    ("stop", [1], "stop"),
    ("stop", {"a": 1}, "stop"),
    ("stop_token_ids", [-1], "stop_token_ids"),
    ("stop_token_ids", [10**6], "stop_token_ids"),
    ("stop_token_ids", [2**70], "stop_token_ids"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {"1.5": 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"٣": 1}, "logit_bias"),
    ("logit_bias", {"9" * 400: 1}, "logit_bias"),
    ("logit_bias", {"1": 101}, "logit_bias"),
    ("logit_bias", {"1": None}, "logit_bias"),
    ("logit_bias", {"999999": 1}, "logit_bias"),
    ("logit_bias", [1], "logit_bias"),
    ("prompt_logprobs", 65, "prompt_logprobs"),
    ("prompt_logprobs", -1, "prompt_logprobs"),
    ("stream", 1, "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", {"x": 1}, "stream_options"),
    ("cache_salt", "", "cache_salt"),
    ("priority", 2**40, "priority"),
    ("bogus", None, "bogus"),
    ("__proto__", {}, "__proto__"),
    ("a b", 1, "a b"),
    *((name, {"x": 1}, name) for name in NEUTRAL),
]
BAD_COMPLETIONS: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", [[1], []], "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", {"a": 1}, "prompt"),
    ("prompt", [1, "a"], "prompt"),
    ("prompt", [True], "prompt"),
    ("prompt", [1.5], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [2**70], "prompt"),
    ("prompt", [10**6], "prompt"),
    ("prompt", [[1], "a"], "prompt"),
    ("prompt", [None], "prompt"),
    ("prompt", nested(500), "prompt"),
    ("prompt", "x " * 5000, "prompt"),
    ("prompt", [5] * MAX_MODEL_LEN, "prompt"),
    ("prompt", ["x"] * 1025, "prompt"),
    ("prompt", [5] * 200_000 + ["x"], "prompt"),
    ("logprobs", 65, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("best_of", 2, "best_of"),
    ("echo", "yes", "echo"),
]
BAD_CHATS: list[tuple[str, Any, str]] = [
    ("messages", [], "messages"),
    ("messages", None, "messages"),
    ("messages", "hi", "messages"),
    ("messages", [1], "messages[0]"),
    ("messages", [{}], "messages[0].role"),
    ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [{"id": "c"}]}], "messages[0].tool_calls[0]"),
    ("messages", [{"role": "user", "content": "x", "bogus": 1}], "messages[0].bogus"),
    ("messages", [{"role": "user", "content": "x " * 5000}], "messages"),
    ("messages", [{"role": "user", "content": "x"}] * 5000, "messages"),
    ("logprobs", 1, "logprobs"),
    ("top_logprobs", 1, "top_logprobs"),
    ("max_completion_tokens", -1, "max_completion_tokens"),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("field", "value", "param"), BAD_FIELDS + BAD_COMPLETIONS)
async def test_bad_completion_fields(served: Served, field: str, value: Any, param: str) -> None:
    await refused(served, "/v1/completions", {"model": "base", "prompt": "x", field: value}, param)


@pytest.mark.parametrize(("field", "value", "param"), BAD_FIELDS + BAD_CHATS)
async def test_bad_chat_fields(served: Served, field: str, value: Any, param: str) -> None:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 8, field: value}
    await refused(served, "/v1/chat/completions", body, param)


async def refused(served: Served, path: str, body: Any, param: str) -> None:
    # 2**70 and the like need Python's own encoder.
    reply = await served.http.post(path, content=json.dumps(body), headers=JSON)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"].startswith(param) and param.split("[")[0] in error["message"]
    assert len(reply.content) < 2000 and not served.client.requests


async def test_prompt_without_tokens(served: Served) -> None:
    await refused(served, "/v1/completions", {"model": "base", "prompt": "", "add_special_tokens": False}, "prompt")


@pytest.mark.parametrize("missing", ["model", "prompt"])
async def test_missing_fields(served: Served, missing: str) -> None:
    body = {"model": "base", "prompt": "x"}
    del body[missing]
    assert (await served.error("/v1/completions", body, 400))["param"] == missing


async def test_unknown_model(served: Served) -> None:
    for name in ("nope", "v1", "../a", "A", "a\x00", "你", "x" * 1000):
        error = await served.error("/v1/completions", {"model": name, "prompt": "x"}, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"


@pytest.mark.parametrize("field", sorted(IGNORED))
async def test_ignored_fields(served: Served, field: str) -> None:
    await served.complete(**{field: {"any": ["thing"]}})


async def test_neutral_values(served: Served) -> None:
    for field, values in NEUTRAL.items():
        for value in (None, *values):
            await served.complete(**{field: value})
    # A value equal to a neutral one, but of another type, is not neutral.
    for field, value in {"use_beam_search": 0, "return_tokens_as_token_ids": 0, "length_penalty": True}.items():
        await served.error("/v1/completions", {"model": "base", "prompt": "x", field: value}, 400)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "prompt": "x", "temperature": NaN}',
        b'{"model": "base", "prompt": "x", "temperature": Infinity}',
        b'{"model": "base", "prompt": "x", "temperature": 1e999}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 10,
        '{"model": "base"}'.encode("utf-16"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/admin/adapters"])
async def test_bad_bodies(served: Served, path: str, body: bytes) -> None:
    reply = await served.http.post(path, content=body, headers={**JSON, **ADMIN})
    assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_content_types(served: Served) -> None:
    body = b'{"model": "base", "prompt": "x"}'
    for kind, status in {
        "application/json; charset=utf-8": 200,
        "application/x-www-form-urlencoded": 400,
        "text/plain": 400,
        "multipart/form-data": 400,
        ";": 400,
    }.items():
        reply = await served.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert reply.status_code == status, kind


async def test_surrogates_that_come_as_a_pair_are_a_character(served: Served) -> None:
    body = b'{"model": "base", "prompt": "\\ud83d\\udc4b", "echo": true, "max_tokens": 0}'
    reply = await served.http.post("/v1/completions", content=body, headers=JSON)
    assert reply.json()["choices"][0]["text"] == "👋"


@pytest.mark.parametrize("chunked", [True, False])
async def test_body_limit(serve: Serve, chunked: bool) -> None:
    served = serve(limits=HttpLimits(max_body=1000))

    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    content = chunks() if chunked else b"x" * 2000
    reply = await served.http.post("/v1/completions", content=content, headers=JSON)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    assert (await served.complete(prompt="x"))["choices"]


async def test_too_many_sequences(serve: Serve) -> None:
    served = serve(limits=HttpLimits(max_sequences=8))
    await served.complete(prompt=["x"] * 4, n=2)
    error = await served.error("/v1/completions", {"model": "base", "prompt": ["x"] * 3, "n": 3}, 400)
    assert error["param"] == "n"


async def test_a_huge_single_word_does_not_hold_up_the_loop(serve: Serve) -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(), max_model_len=2**20)
    served = serve(tokenizer=tokenizer)
    body = {"model": "base", "prompt": "a" * 1_000_000}
    long = asyncio.create_task(served.post("/v1/completions", body))
    worst, last = 0.0, time.perf_counter()
    while not long.done():
        await asyncio.sleep(0.001)
        worst, last = max(worst, time.perf_counter() - last), time.perf_counter()
    assert (await long).json()["error"]["code"] == "context_length_exceeded"
    assert worst < 0.5


async def test_text_work_is_bounded() -> None:
    workers = Workers(threads=1, max_waiting=2, deadline=0.1)
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(5)

    first, second = asyncio.create_task(workers.run(block)), asyncio.create_task(workers.run(block))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="too many"):
        await workers.run(block)
    for task in (first, second):
        with pytest.raises(Overloaded, match="took longer"):
            await task
    release.set()
    async with asyncio.timeout(5):
        while True:
            try:
                assert await workers.run(lambda: 5) == 5
                break
            except Overloaded:
                await asyncio.sleep(0.01)
    workers.close()
    with pytest.raises(Overloaded, match="stopping"):
        await workers.run(block)


# --- any JSON at all ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["", "a", "base", "user", "text", "x" * 300, "\x00", "1", 2**63, 2**70, -(2**63), 1e308, "👋"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=4),
    ),
    max_leaves=8,
)
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL, *IGNORED, "role", "content", "id"})
PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/admin/adapters"),
    ("PUT", "/admin/adapters/a"),
    ("POST", "/admin/compositions"),
    ("PUT", "/admin/compositions/a"),
    ("POST", "/admin/compositions/fit"),
    ("GET", "/admin/jobs/a"),
    ("POST", "/admin/proxies"),
    ("PUT", "/admin/proxies/a"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
BASES: list[dict[str, Any]] = [
    {},
    {"model": "base", "prompt": "the cat", "max_tokens": 2},
    {"model": "a", "prompt": [[5, 6], [7]], "max_tokens": 1, "logprobs": 1, "echo": True},
    {"model": "a", "messages": MESSAGES, "max_tokens": 2, "stream": True},
    {"tokens": [5, 6]},
    {"id": "b", "source": "/x"},
    {"id": "b", "adapters": [{"id": "a", "weight": 1}]},
    {"lora_name": "b", "lora_path": "/x"},
]
FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    route=st.sampled_from(PATHS),
    base=st.sampled_from(BASES),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
async def test_no_body_gives_a_server_error(
    served: Served, route: tuple[str, str], base: dict[str, Any], changes: dict[str, Any]
) -> None:
    reply = await served.http.request(route[0], route[1], content=json.dumps(base | changes), headers={**JSON, **ADMIN})
    assert reply.status_code < 500, (reply.status_code, reply.text)
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]


@FUZZ
@given(route=st.sampled_from(PATHS), value=VALUES)
async def test_no_json_gives_a_server_error(served: Served, route: tuple[str, str], value: Any) -> None:
    reply = await served.http.request(route[0], route[1], content=json.dumps(value), headers={**JSON, **ADMIN})
    assert reply.status_code < 500, (reply.status_code, reply.text)


@FUZZ
@given(
    path=st.text(st.characters(codec="utf-8", exclude_characters="?#"), max_size=30),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]),
    prefix=st.sampled_from(["/", "/v1/models/", "/admin/adapters/"]),
)
async def test_no_path_gives_a_server_error(served: Served, method: str, prefix: str, path: str) -> None:
    reply = await served.http.request(method, prefix + quote(path), headers=ADMIN)
    assert reply.status_code < 500, (reply.status_code, reply.text)
