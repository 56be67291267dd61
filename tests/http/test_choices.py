"""``task_id`` and ``lora_rank``: what a request chooses of its adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.http.conftest import ADMIN, Served
from weft.adapters.choices import Choice

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the cat"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.fixture
def served(served: Served) -> Served:
    """With the adapter ``t``, which needs a task and has a rank by default; ``a`` has neither."""
    record = served.registry.add("t")
    choices = (Choice("task_id", 0, 2), Choice("lora_rank", 1, 8, 8))
    served.registry.records["t"] = replace(record, info=replace(record.info, choices=choices, invocation=(7, 8)))
    return served


@pytest.mark.parametrize("path", BODIES)
async def test_the_engine_is_told(path: str, served: Served) -> None:
    for fields in ({"task_id": 2}, {"task_id": 0, "lora_rank": 1}, {"task_id": 1, "lora_rank": None}):
        reply = await served.post(path, {"model": "t", **BODIES[path], **fields})
        assert reply.status_code == 200, reply.text
        given = {name: value for name, value in fields.items() if value is not None}
        assert served.client.requests[-1].choices == given
    await served.post(path, {"model": "a", **BODIES[path], "task_id": None})
    assert served.client.requests[-1].choices == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        ("t", {}, "task_id"),
        ("t", {"task_id": 3}, "task_id"),
        ("t", {"task_id": -1}, "task_id"),
        ("t", {"task_id": "1"}, "task_id"),
        ("t", {"task_id": 1.0}, "task_id"),
        ("t", {"task_id": True}, "task_id"),
        ("t", {"task_id": 1 << 40}, "task_id"),
        ("t", {"lora_rank": 4}, "task_id"),
        ("t", {"task_id": 1, "lora_rank": 9}, "lora_rank"),
        ("t", {"task_id": 1, "lora_rank": 0}, "lora_rank"),
        ("a", {"task_id": 0}, "task_id"),
        ("a", {"lora_rank": 1}, "lora_rank"),
        ("base", {"lora_rank": 1}, "lora_rank"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_what_cannot_be_served_reaches_no_engine(
    path: str, model: str, fields: dict, param: str, stream: bool, served: Served
) -> None:
    error = await served.error(path, {"model": model, **BODIES[path], **fields, "stream": stream}, 400)
    assert error["param"] == param and param in error["message"]
    assert not served.client.requests


async def test_the_admin_api_tells_the_choices(served: Served) -> None:
    reply = await served.http.get("/admin/adapters/t", headers=ADMIN)
    assert reply.json()["choices"] == {
        "task_id": {"min": 0, "max": 2, "default": None},
        "lora_rank": {"min": 1, "max": 8, "default": 8},
    }
    assert reply.json()["invocation"] == [7, 8]
    reply = await served.http.get("/admin/adapters/a", headers=ADMIN)
    assert reply.json()["choices"] == {} and reply.json()["invocation"] == []
