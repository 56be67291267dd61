"""The application on a fake engine, reached without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI

from tests.http.fakes import CHAT_TEMPLATE, MAX_MODEL_LEN, FakeClient, FakeRegistry, byte_level_tokenizer
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
from weft.server.http.state import HttpLimits, ServerState
from weft.server.observability.metrics import Metrics
from weft.server.registry.compositions import Compositions
from weft.server.registry.proxies import Proxies
from weft.server.tokenization import Tokenizer

ADMIN_KEY = "admin-key"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@dataclass
class Served:
    """A server and what it stands on."""

    http: httpx.AsyncClient
    client: FakeClient
    registry: FakeRegistry
    tokenizer: Tokenizer
    state: ServerState
    app: Any

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def complete(self, **body: Any) -> Any:
        reply = await self.post("/v1/completions", {"model": "base", "prompt": "the cat", **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def chat(self, **body: Any) -> Any:
        messages = [{"role": "user", "content": "hi"}]
        reply = await self.post("/v1/chat/completions", {"model": "base", "messages": messages, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def error(self, path: str, body: Any, status: int, **options: Any) -> Any:
        reply = await self.post(path, body, **options)
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error


def events(reply: httpx.Response, *, comments: bool = False) -> list[Any]:
    """The events of a stream; the last one, ``[DONE]``, as a string. Without its comments, if it may have some."""
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == ""
    blocks = [block for block in blocks if not (comments and block.startswith(":"))]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(chat_template=CHAT_TEMPLATE), max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def apps() -> dict[HttpLimits, FastAPI]:
    """Applications by their limits: building one takes longer than most tests."""
    return {}


Serve = Callable[..., Served]


@pytest.fixture
async def serve(tokenizer: Tokenizer, apps: dict[HttpLimits, FastAPI], tmp_path: Path) -> AsyncIterator[Serve]:
    """Makes servers: ``serve(api_keys=("k",), limits=HttpLimits(...))``."""
    made: list[Served] = []

    def make(
        *, api_keys: tuple[str, ...] = (), limits: HttpLimits | None = None, tokenizer: Tokenizer = tokenizer
    ) -> Served:
        base_names = ("base", "alias/of-base")
        client, registry = FakeClient(tokenizer), FakeRegistry(base_names)
        registry.add("a")
        state = ServerState(
            client=client,  # type: ignore[arg-type]
            registry=registry,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            metrics=Metrics(client, registry),
            keys=Keyring(ADMIN_KEY, api_keys),
            base_names=base_names,
            compositions=Compositions(tmp_path / f"state-{len(made)}", registry),  # type: ignore[arg-type]
            proxies=Proxies(tmp_path / f"state-{len(made)}", registry),  # type: ignore[arg-type]
            limits=limits or HttpLimits(),
        )
        if state.limits not in apps:
            apps[state.limits] = create_app(state)
        app = apps[state.limits]
        app.state.weft = state
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://weft")
        made.append(Served(http, client, registry, tokenizer, state, app))
        return made[-1]

    yield make
    for served in made:
        await served.http.aclose()
        await served.state.jobs.close()
        served.state.workers.close()


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()
