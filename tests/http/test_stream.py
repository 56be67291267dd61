"""Server-sent events, errors in mid-stream, and clients that leave or stall."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from tests.http.conftest import Serve, Served, events
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, Overloaded
from weft.server.http.generation import merged
from weft.server.http.state import HttpLimits
from weft.server.http.stream import while_connected

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "a", "prompt": "the cat"}
ROUTES = [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


class RawClient:
    """An ASGI client that can leave, or stop reading, at any moment."""

    def __init__(self, served: Served, path: str, body: bytes) -> None:
        self.messages: list[Message] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self._gone = asyncio.Event()
        self._body = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [(b"content-type", b"application/json"), (b"host", b"weft")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("test", 1),
            "server": ("weft", 80),
        }
        self.task = asyncio.create_task(served.app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        if self._body:
            return self._body.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        self.messages.append(message)


def raw(served: Served, path: str, body: Any) -> RawClient:
    return RawClient(served, path, served.http.build_request("POST", path, json=body).content)


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_usage_in_the_last_chunk(served: Served, path: str, body: Any) -> None:
    served.client.cached_tokens = 1
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    *chunks, last, done = events(await served.post(path, body | options))
    assert done == "[DONE]" and all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_usage_in_every_chunk(served: Served) -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 3}
    *chunks, _ = events(await served.post("/v1/completions", TEXT | options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


async def test_no_event_for_text_that_is_held_back(served: Served) -> None:
    served.client.output = "👋"  # four tokens, and the end
    *chunks, _ = events(await served.post("/v1/completions", TEXT | {"stream": True, "max_tokens": 9}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "👋", ""]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full", retry_after=7), 429),
        (InvalidRequest("no", param="seed"), 400),
        (EngineUnavailable("dead"), 503),
    ],
)
async def test_error_before_the_first_token_has_its_status(
    served: Served, path: str, body: Any, stream: bool, error: Any, status: int
) -> None:
    served.client.fail = error
    reply = await served.post(path, body | {"stream": stream})
    assert reply.status_code == status and reply.headers["content-type"] == "application/json"
    assert reply.json()["error"]["message"] == error.message
    assert reply.headers.get("retry-after") == {429: "7", 503: "2"}.get(status)
    assert served.registry.leases == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineUnavailable("the engine died"), "engine_unavailable"),
        (Conflict("unloaded", code="adapter_unloaded"), "adapter_unloaded"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_error_in_mid_stream_is_the_last_event(
    served: Served, path: str, body: Any, error: Any, code: str
) -> None:
    served.client.fail_after = (2, error)
    *chunks, last = events(await served.post(path, body | {"stream": True}))
    assert len(chunks) >= 2 and all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == code and "secret" not in last["error"]["message"]
    assert served.registry.leases == []


async def test_abort_by_the_engine_is_an_error(served: Served) -> None:
    served.client.finish = ("abort", None)
    error = await served.error("/v1/completions", TEXT, 503)
    assert error["code"] == "request_abort"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_leaving_aborts_the_request(served: Served, path: str, body: Any, stream: bool, tokens: int) -> None:
    served.client.gate = asyncio.Semaphore(tokens)
    served.client.output = "the quick brown fox jumps over"
    client = raw(served, path, body | {"stream": stream, "n": 2, "max_tokens": 50})
    await eventually(lambda: len(served.client.requests) == 2 and served.client.gate.locked())  # type: ignore[union-attr]
    assert served.registry.leases == ["a"]
    client.leave()
    await asyncio.wait_for(client.task, 5)
    assert sorted(served.client.aborted) == sorted(request.request_id for request in served.client.requests)
    assert served.registry.leases == [] and not served.client.finished


async def test_leaving_while_tokenizing_leaves_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()

    async def never(*_: object) -> None:
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(served.state.workers, "run", never)
    client = raw(served, "/v1/completions", TEXT)
    await started.wait()
    client.leave()
    await asyncio.wait_for(client.task, 5)
    assert served.registry.leases == [] and not served.client.requests


async def test_a_client_that_stops_reading_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.http.stream.WATCH_INTERVAL", 0.02)
    served = serve(limits=HttpLimits(send_timeout=0.1))
    served.client.output = "the quick brown fox " * 8
    served.client.gate = asyncio.Semaphore(2)
    client = raw(served, "/v1/completions", TEXT | {"stream": True, "max_tokens": 50})
    await eventually(lambda: len(client.messages) == 3)
    client.reading.clear()
    served.client.gate.release()
    await asyncio.wait_for(client.task, 5)
    assert len(served.client.aborted) == 1 and served.registry.leases == []


async def test_a_slow_token_is_no_stall(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.http.stream.WATCH_INTERVAL", 0.02)
    served = serve(limits=HttpLimits(send_timeout=0.05))
    served.client.gate = asyncio.Semaphore(1)
    client = raw(served, "/v1/completions", TEXT | {"stream": True, "max_tokens": 2})
    await eventually(lambda: len(client.messages) == 2)
    await asyncio.sleep(0.2)
    served.client.gate.release()
    await asyncio.wait_for(client.task, 5)
    assert not served.client.aborted and b"[DONE]" in client.messages[-2]["body"]


async def test_merged_ends_every_stream_after_one_error() -> None:
    closed = []

    async def stream(number: int) -> AsyncGenerator[int, None]:
        try:
            yield number
            if number == 1:
                raise InvalidRequest("no")
            await asyncio.Event().wait()
        finally:
            closed.append(number)

    with pytest.raises(InvalidRequest):
        async for _ in merged([stream(number) for number in range(4)]):
            pass
    assert sorted(closed) == [0, 1, 2, 3]


async def test_merged_holds_a_bounded_number() -> None:
    made = 0

    async def stream() -> AsyncGenerator[int, None]:
        nonlocal made
        while True:
            made += 1
            yield made

    merge = merged([stream(), stream()])
    await anext(merge)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert made < 200
    await merge.aclose()


async def test_work_is_over_when_its_client_is_gone() -> None:
    over = False

    async def work() -> None:
        nonlocal over
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            over = True

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await while_connected(receive, work())
    assert over
