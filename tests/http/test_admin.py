"""The admin API and vLLM's adapter routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.http.conftest import ADMIN, Served
from weft.server.errors import EngineUnavailable


async def admin(served: Served, method: str, path: str, body: Any = None, **options: Any) -> Any:
    headers = {**ADMIN, **options.pop("headers", {})}
    return await served.http.request(method, f"/admin/adapters{path}", json=body, headers=headers, **options)


async def test_load(served: Served) -> None:
    reply = await admin(served, "POST", "", {"id": "b", "source": "/x", "pinned": True})
    assert reply.status_code == 201
    card = reply.json()
    assert card["id"] == "b" and card["source"] == "/x" and card["pinned"] is True and card["state"] == "ready"
    assert (card["method"], card["forms"], card["rank"], card["num_sites"], card["nbytes"]) == (
        "LORA",
        ["LowRank"],
        8,
        12,
        4096,
    )
    assert reply.headers["etag"] == f'"{card["version"]}"'
    assert "b" in [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]]


async def test_load_of_a_taken_id(served: Served) -> None:
    reply = await admin(served, "POST", "", {"id": "a", "source": "/x"})
    assert reply.status_code == 409 and reply.json()["error"]["code"] == "adapter_exists"


async def test_load_of_a_broken_adapter(served: Served) -> None:
    reply = await admin(served, "POST", "", {"id": "b", "source": "/broken"})
    assert reply.status_code == 422
    assert reply.json()["error"] == {
        "message": "tensor 'x' is missing",
        "type": "adapter_error",
        "param": "x",
        "code": "adapter_error",
    }


async def test_load_for_another_base(served: Served) -> None:
    assert (await admin(served, "POST", "", {"id": "b", "source": "/x", "base": "base"})).status_code == 201
    reply = await admin(served, "POST", "", {"id": "c", "source": "/x", "base": "small"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "base"


async def test_list_and_show_tell_where_it_is(served: Served) -> None:
    served.client.stats = replace(served.client.stats, tiers={"v1": "device"}, refcounts={"v1": 3})
    (card,) = (await admin(served, "GET", "")).json()["data"]
    assert (card["id"], card["tier"], card["refcount"]) == ("a", "device", 3)
    reply = await admin(served, "GET", "/a")
    assert reply.json() == card and reply.headers["etag"] == '"v1"'
    assert (await admin(served, "GET", "/zz")).status_code == 404


async def test_inspection_works_while_the_engine_is_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> None:
        raise EngineUnavailable("restarting")

    monkeypatch.setattr(served.client, "refresh_stats", gone)
    assert (await admin(served, "GET", "/a")).status_code == 200


@pytest.mark.parametrize("header", [None, '"v1"', "v1", "*"])
async def test_replace(served: Served, header: str | None) -> None:
    headers = {} if header is None else {"If-Match": header}
    reply = await admin(served, "PUT", "/a", {"source": "/y"}, headers=headers)
    assert reply.status_code == 200 and reply.json()["version"] == "v1+"


@pytest.mark.parametrize("header", ['"v0"', "", '"', '"v1", "v2"', 'W/"v1"'])
async def test_replace_of_another_version(served: Served, header: str) -> None:
    reply = await admin(served, "PUT", "/a", {"source": "/y"}, headers={"If-Match": header})
    assert reply.status_code == 412 and reply.json()["error"]["code"] == "precondition_failed"
    assert served.registry.get("a").version == "v1"


async def test_replace_of_nothing(served: Served) -> None:
    assert (await admin(served, "PUT", "/zz", {"source": "/y"})).status_code == 404


async def test_unload(served: Served) -> None:
    reply = await admin(served, "DELETE", "/a")
    assert reply.status_code == 200 and reply.json() == {"id": "a", "object": "adapter", "deleted": True}
    assert (await admin(served, "DELETE", "/a")).status_code == 404
    served.registry.add("a")
    await admin(served, "DELETE", "/a", params={"force_after": "1.5"})
    assert served.registry.forced == [None, 1.5]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x", "1e999"])
async def test_unload_with_a_bad_deadline(served: Served, value: str) -> None:
    reply = await admin(served, "DELETE", "/a", params={"force_after": value})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "force_after"
    assert served.registry.list()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "b"}, "source"),
        ({"id": "", "source": "/x"}, "id"),
        ({"id": "b" * 300, "source": "/x"}, "id"),
        ({"id": "b", "source": "/x", "pinned": 1}, "pinned"),
        ({"id": "b", "source": "/x", "rank": 1}, "rank"),
        ({"id": "b", "source": ["/x"]}, "source"),
    ],
)
async def test_bad_bodies(served: Served, body: Any, param: str) -> None:
    reply = await admin(served, "POST", "", body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


async def test_vllm_load_and_unload(served: Served) -> None:
    async def vllm(verb: str, **body: Any) -> Any:
        return await served.post(f"/v1/{verb}_lora_adapter", body, headers=ADMIN)

    reply = await vllm("load", lora_name="sql", lora_path="/x")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    reply = await vllm("load", lora_name="sql", lora_path="/x")
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "InvalidUserInput"
    reply = await vllm("load", lora_name="sql", lora_path="/y", load_inplace=True)
    assert reply.status_code == 200 and served.registry.get("sql").source == "/y"
    reply = await vllm("load", lora_name="new", lora_path="/y", load_inplace=True)
    assert reply.status_code == 200 and served.registry.get("new").source == "/y"
    reply = await vllm("load", lora_name="bad", lora_path="/broken")
    assert reply.status_code == 400 and "tensor 'x'" in reply.json()["error"]["message"]
    reply = await vllm("unload", lora_name="sql", lora_int_id=1)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    reply = await vllm("unload", lora_name="sql")
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "NotFoundError" and reply.json()["error"]["code"] == 404
    assert (await vllm("load", lora_name="x")).status_code == 400
