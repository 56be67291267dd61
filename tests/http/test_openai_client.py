"""The official openai client, unmodified, against a live server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.http.conftest import Serve, Served
from tests.http.live import serving
from weft.server.errors import EngineUnavailable, Overloaded
from weft.server.http.state import HttpLimits

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve(api_keys=("secret",))


@pytest.fixture
def url(served: Served) -> Iterator[str]:
    with serving(served.app) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"base", "alias/of-base", "a"}
    assert client.models.retrieve("a") == models["a"]
    assert client.models.retrieve("alias/of-base").owned_by == "weft"


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="a", prompt=["the cat", "the dog"], n=2, max_tokens=2, logprobs=1, echo=True, seed=3, stop=["zzz"]
    )
    assert [choice.text for choice in reply.choices] == ["the catthe quick"] * 2 + ["the dogthe quick"] * 2
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.tokens[-1] == " quick"
    assert reply.usage is not None and reply.usage.completion_tokens == 8


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model="base", prompt=[5, 6], stream=True, stream_options={"include_usage": True})
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "the quick brown fox"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="a", messages=MESSAGES, max_completion_tokens=2, logprobs=True, top_logprobs=2, n=2, user="me"
    )
    assert [choice.message.content for choice in reply.choices] == ["the quick"] * 2
    assert reply.choices[0].message.role == "assistant"
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]
    # A conversation goes on with the client's own message objects.
    turn: list[Any] = [*MESSAGES, reply.choices[0].message, *MESSAGES]
    assert client.chat.completions.create(model="a", messages=turn).choices[0].finish_reason == "stop"


def test_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="a", messages=MESSAGES) as stream:
        contents = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(contents) == "the quick brown fox" == final.choices[0].message.content
    assert len(contents) > 2 and final.choices[0].finish_reason == "stop"


def test_extensions_go_through_extra_body(served: Served, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="a", messages=MESSAGES, extra_body={"top_k": 5, "return_token_ids": True, "cache_salt": "s"}
    )
    assert served.client.requests[0].params.top_k == 5 and served.client.requests[0].cache_salt == "s"
    assert reply.model_extra is not None and reply.model_extra["prompt_token_ids"]


async def test_async_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        replies = await asyncio.gather(
            *(client.chat.completions.create(model="a", messages=MESSAGES) for _ in range(16))
        )
        assert {reply.choices[0].message.content for reply in replies} == {"the quick brown fox"}
        stream = await client.completions.create(model="a", prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "the quick brown fox"


def test_errors_are_the_clients_own(served: Served, url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="x")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="a", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="a", prompt=[5] * 300)
    served.client.fail = Overloaded("full")
    with pytest.raises(openai.RateLimitError, match="full"):
        client.completions.create(model="a", prompt="x")
    served.client.fail = EngineUnavailable("dead")
    with pytest.raises(openai.InternalServerError, match="dead"):
        client.completions.create(model="a", prompt="x")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_error_in_mid_stream(served: Served, client: openai.OpenAI) -> None:
    served.client.fail_after = (2, EngineUnavailable("the engine died"))
    texts = []
    with pytest.raises(openai.APIError, match="the engine died"):
        for chunk in client.completions.create(model="a", prompt="x", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts == ["the", " quick"]


def test_closing_a_stream_aborts(served: Served, client: openai.OpenAI) -> None:
    served.client.gate = asyncio.Semaphore(2)
    stream = client.completions.create(model="a", prompt="x", stream=True, max_tokens=50)
    next(iter(stream))
    stream.close()
    eventually(lambda: served.client.aborted and not served.registry.leases)


def test_hanging_up_before_the_first_token_aborts(served: Served, url: str) -> None:
    served.client.gate = asyncio.Semaphore(0)
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "a", "prompt": "x", "stream": stream}
            httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=0.3)
    eventually(lambda: len(served.client.aborted) == 2 and not served.registry.leases)


def test_a_body_beyond_the_limit_is_answered_to_a_client_that_sends_it_all(served: Served, url: str) -> None:
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    body = b"x" * (served.state.limits.max_body + 1)
    assert httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=20).status_code == 413


def test_a_client_that_never_reads_holds_nothing_for_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.http.stream.WATCH_INTERVAL", 0.05)
    served = serve(limits=HttpLimits(send_timeout=0.3))
    served.client.info = replace(served.client.info, max_model_len=10**7)
    served.client.output = [264] * 2_000_000
    with serving(served.app) as (url, _), socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((urlsplit(url).hostname, urlsplit(url).port))
        body = b'{"model": "a", "prompt": "x", "stream": true, "max_tokens": 2000000}'
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: served.client.aborted and not served.registry.leases)
