"""Health, metrics, models, the tokenizer's routes, ids and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from tests.http.conftest import ADMIN, Serve, Served
from weft.server.http.auth import Keyring

OPEN = ["/livez", "/readyz", "/health", "/ping", "/version", "/metrics", "/", "/docs", "/openapi.json"]
NEEDS_KEY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/a"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
]
NEEDS_ADMIN = [
    ("POST", "/admin/adapters"),
    ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/a"),
    ("PUT", "/admin/adapters/a"),
    ("DELETE", "/admin/adapters/a"),
    ("POST", "/admin/compositions"),
    ("GET", "/admin/compositions"),
    ("POST", "/admin/compositions/fit"),
    ("GET", "/admin/compositions/a"),
    ("PUT", "/admin/compositions/a"),
    ("DELETE", "/admin/compositions/a"),
    ("GET", "/admin/jobs"),
    ("GET", "/admin/jobs/a"),
    ("DELETE", "/admin/jobs/a"),
    ("GET", "/admin/jobs/a/events"),
    ("POST", "/admin/proxies"),
    ("GET", "/admin/proxies"),
    ("GET", "/admin/proxies/a"),
    ("PUT", "/admin/proxies/a"),
    ("DELETE", "/admin/proxies/a"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.mark.parametrize("path", OPEN)
async def test_open_routes(serve: Serve, path: str) -> None:
    assert (await serve(api_keys=("k",)).http.get(path)).status_code == 200


async def test_readiness(served: Served) -> None:
    served.client.ready, served.client.unready_reason = False, "the engine is loading"
    for path in ("/readyz", "/health", "/ping"):
        reply = await served.http.get(path)
        assert reply.status_code == 503 and reply.json()["error"]["message"] == "the engine is loading"
    assert (await served.http.post("/ping")).status_code == 503
    assert (await served.http.get("/livez")).status_code == 200


async def test_models(served: Served) -> None:
    served.registry.records["gone"] = replace(served.registry.add("gone"), state="draining")
    reply = (await served.http.get("/v1/models")).json()
    cards = {card["id"]: card for card in reply["data"]}
    assert reply["object"] == "list" and set(cards) == {"base", "alias/of-base", "a"}
    assert cards["a"]["parent"] == "base" and cards["a"]["root"] == "/adapters/a"
    assert cards["base"]["parent"] is None and cards["base"]["root"] == "fake"
    for name, card in cards.items():
        assert card["object"] == "model" and card["owned_by"] == "weft" and isinstance(card["created"], int)
        assert (await served.http.get(f"/v1/models/{name}")).json() == card
    reply = await served.http.get("/v1/models/zz")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"


async def test_metrics_of_requests(served: Served) -> None:
    await served.complete(model="a", max_tokens=3)
    await served.complete(max_tokens=3, n=2)
    served.client.finish = ("error", "oops")
    await served.error("/v1/completions", {"model": "a", "prompt": "x"}, 503)
    reply = await served.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = reply.text.splitlines()
    assert 'weft_requests_total{adapter="a",finish_reason="length"} 1.0' in lines
    assert 'weft_requests_total{adapter="a",finish_reason="error"} 1.0' in lines
    assert 'weft_requests_total{adapter="__base__",finish_reason="length"} 2.0' in lines
    assert 'weft_time_to_first_token_seconds_count{adapter="__base__"} 2.0' in lines
    assert 'weft_inter_token_latency_seconds_count{adapter="__base__"} 4.0' in lines
    assert 'weft_request_generation_tokens_sum{adapter="__base__"} 6.0' in lines
    assert 'weft_request_prompt_tokens_sum{adapter="__base__"} 6.0' in lines


async def test_tokenize_and_back(served: Served) -> None:
    async def tokens(**body: Any) -> Any:
        reply = await served.post("/tokenize", body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    assert await tokens(prompt="the cat", return_token_strs=True) == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [1, 264, 284],
        "token_strs": ["<s>", "the", " cat"],
    }
    assert (await tokens(model="a", prompt="the cat", add_special_tokens=False))["tokens"] == [264, 284]
    chat = await tokens(messages=[{"role": "user", "content": "hi"}])
    reply = await served.post("/detokenize", {"model": "base", "tokens": chat["tokens"]})
    assert reply.json() == {"prompt": "<s><|user|>hi</s><|assistant|>"}
    await served.error("/tokenize", {"model": "zz", "prompt": "x"}, 404)
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        assert (await served.error("/tokenize", body, 400))["param"] == "prompt"
    await served.error("/detokenize", {"tokens": [-1]}, 400)
    assert (await served.post("/detokenize", {"tokens": [10**9]})).status_code == 200


async def test_tokenizer_info(served: Served) -> None:
    info = (await served.http.get("/tokenizer_info")).json()
    assert info["eos_token"] == "</s>" and info["chat_template"] == served.tokenizer.chat_template


async def test_request_ids(served: Served) -> None:
    reply = await served.http.get("/livez", headers={"X-Request-Id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    made = set()
    for given in (None, "a b", "x" * 200, "é", ""):
        headers = {} if given is None else {b"X-Request-Id": given.encode()}
        made.add((await served.http.get("/nowhere", headers=headers)).headers["x-request-id"])
    assert len(made) == 5 and all(len(request_id) == 32 for request_id in made)


async def test_log_line(served: Served) -> None:
    with capture_logs() as lines:
        await served.complete(model="a")
        await served.http.get("/readyz")
    first, second = (line for line in lines if line["event"] == "http.request")
    assert (first["model"], first["status"], first["log_level"]) == ("a", 200, "info")
    assert second["log_level"] == "debug"


@pytest.mark.parametrize(("method", "path"), NEEDS_KEY)
async def test_api_key(serve: Serve, method: str, path: str) -> None:
    served = serve(api_keys=("first", "zweiter-schlüssel"))
    wrong = ["", "Bearer", "Bearer ", "Bearer firs", "Bearer first2", "Basic first", "first", "Bearer \xff"]
    for value in [None, *wrong]:
        headers = {} if value is None else {b"Authorization": value.encode("latin-1")}
        reply = await served.http.request(method, path, headers=headers)
        assert reply.status_code == 401, value
        assert reply.json()["error"]["code"] == "invalid_api_key" and reply.headers["www-authenticate"] == "Bearer"
    for key in ("first", "zweiter-schlüssel", "admin-key"):
        reply = await served.http.request(method, path, headers={b"Authorization": f"bearer {key}".encode()})
        assert reply.status_code in (200, 400, 404)


@pytest.mark.parametrize(("method", "path"), NEEDS_ADMIN)
async def test_admin_key(serve: Serve, method: str, path: str) -> None:
    served = serve(api_keys=("first",))
    for value in (None, "Bearer first", "Bearer admin-ke"):
        headers = {} if value is None else {"Authorization": value}
        assert (await served.http.request(method, path, headers=headers)).status_code == 401
    assert (await served.http.request(method, path, headers=ADMIN)).status_code in (200, 400, 404)


def test_every_route_is_open_or_has_its_key_tested(served: Served) -> None:
    # A route added without a decision about its key fails here.
    document = served.app.openapi()["paths"]
    listed = {(m.upper(), path) for path, methods in document.items() for m in methods}
    listed = {(method, path.replace("{id}", "a").replace("{model}", "a")) for method, path in listed}
    assert listed == {
        *NEEDS_KEY,
        *NEEDS_ADMIN,
        *(("GET", path) for path in OPEN if path not in ("/docs", "/openapi.json")),
    }


async def test_no_key_reads_no_body(serve: Serve) -> None:
    served = serve(api_keys=("k",))
    sent = 0

    async def body() -> Any:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 1000

    reply = await served.http.post("/v1/completions", content=body())
    assert reply.status_code == 401 and sent == 0


def test_empty_keys_open_nothing() -> None:
    for keys in (("",), ("k", "")):
        with pytest.raises(ValueError):
            Keyring("admin", keys)
    with pytest.raises(ValueError):
        Keyring("")


async def test_every_error_has_the_shape(served: Served) -> None:
    replies: list[httpx.Response] = [
        await served.http.get("/nowhere"),
        await served.http.put("/v1/completions"),
        await served.http.get("/v1/completions"),
        await served.http.post("/v1/completions", content=b"{"),
    ]
    assert [reply.status_code for reply in replies] == [404, 405, 405, 400]
    for reply in replies:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_bug_says_nothing_of_the_inside(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.registry, "list", broken)
    reply = await served.http.get("/v1/models")
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal_error"
