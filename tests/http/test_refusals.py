"""What is wrong with a composition, a term or a side, wherever a body has one: a 4xx that names the very field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.http.conftest import ADMIN, Served
from tests.http.test_hostile import nested
from tests.http.test_proxy import BODIES, JSON, PROXY, served  # noqa: F401  (with a proxy model)
from weft.server.errors import InvalidRequest
from weft.server.http.steering import MAX_TERMS
from weft.server.registry.compositions import MAX_MEMBERS, WeighedId

SMALL = {"model": "small"}
GOOD = {"id": "a", "weight": 1}
NAN, INF = float("nan"), float("inf")
Bad = tuple[Any, int, str]
"""A value, the status, and where in it the error is: "" for the value itself."""

MEMBERS: list[Bad] = [
    # of ``adapters`` for the main model
    ([], 400, ""),
    ({}, 400, ""),
    (GOOD, 400, ""),
    ("a", 400, ""),
    (0, 400, ""),
    ([GOOD] * (MAX_MEMBERS + 1), 400, ""),
    ([{"id": f"a{i}", "weight": 1} for i in range(5000)], 400, ""),
    (["a"], 400, "[0]"),
    ([None], 400, "[0]"),
    (nested(400), 400, "[0]"),
    ([GOOD, []], 400, "[1]"),
    ([{}], 400, "[0].id"),
    ([{"weight": 1}], 400, "[0].id"),
    ([{"id": "a"}], 400, "[0].weight"),
    ([{"id": "", "weight": 1}], 400, "[0].id"),
    ([{"id": "a" * 257, "weight": 1}], 400, "[0].id"),
    ([{"id": None, "weight": 1}], 400, "[0].id"),
    ([{"id": ["a"], "weight": 1}], 400, "[0].id"),
    ([{"id": nested(400), "weight": 1}], 400, "[0].id"),
    *(([{"id": "a", "weight": bad}], 400, "[0].weight") for bad in (
        None, True, False, "1", "NaN", "Infinity", "nan", "", [1], {}, nested(400), 1e9, -1000.1, 10**300,
    )),
    ([GOOD, {"id": "t", "weight": "Infinity"}], 400, "[1].weight"),
    ([{**GOOD, "scale": 1}], 400, "[0].scale"),
    ([{**GOOD, "the scale": 1}], 400, "[0].the scale"),
    ([{**GOOD, "adapters": [GOOD]}], 400, "[0].adapters"),
    ([{**GOOD, "x" * 5000: 1}], 400, f"[0].{'x' * 200}"),
    ([GOOD, GOOD], 400, "[1].id"),
    ([GOOD, {"id": "t", "weight": 0}, {"id": "a", "weight": 0}], 400, "[2].id"),
    ([{"id": "nobody", "weight": 1}], 404, "[0].id"),
    ([GOOD, {"id": "nobody", "weight": 0}], 404, "[1].id"),
    ([{"id": "base", "weight": 1}], 404, "[0].id"),
    ([{"id": "small", "weight": 1}], 404, "[0].id"),
    ([{"id": "x", "weight": 1}], 400, "[0].id"),
    ([GOOD, {"id": "x", "weight": 1}], 400, "[1].id"),
    ([{"id": "mix", "weight": 1}], 400, "[0].id"),
    ([GOOD, {"id": "small-mix", "weight": 1}], 400, "[1].id"),
    ([{"id": "p", "weight": 1}], 400, "[0].id"),
    ([GOOD, {"id": "draining", "weight": 1}], 404, "[1].id"),
]  # fmt: skip

SIDES: list[Bad] = [
    # of a term, or a side of a proxy
    *((({"adapters": value}), status, f".adapters{where}") for value, status, where in MEMBERS),
    ({**SMALL, "adapters": [GOOD]}, 400, ".adapters[0].id"),
    ({**SMALL, "adapters": [{"id": "x", "weight": 1}, {"id": "y", "weight": 1}, GOOD]}, 400, ".adapters[2].id"),
    ({**SMALL, "adapters": [{"id": "small-mix", "weight": 1}]}, 400, ".adapters[0].id"),
    ({"adapter": "a", "adapters": [GOOD]}, 400, ".adapters"),
    ({**SMALL, "combination": "linear"}, 400, ".combination"),
    ({"adapter": "a", "combination": "lorahub"}, 400, ".combination"),
    ({"adapters": [GOOD], "combination": "svd"}, 400, ".combination"),
    ({"adapters": [GOOD], "combination": ["linear"]}, 400, ".combination"),
    ({"adapters": [GOOD], "task_id": 0}, 400, ".task_id"),
    ({"adapters": [GOOD], "lora_rank": 0}, 400, ".lora_rank"),
    ({"adapter": "nobody"}, 404, ".adapter"),
    ({"adapter": ""}, 400, ".adapter"),
    ({"adapter": nested(400)}, 400, ".adapter"),
    ({"adapter": "small-mix"}, 400, ".adapter"),
    ({**SMALL, "adapter": "mix"}, 400, ".adapter"),
    ({"adapter": "broken"}, 409, ".adapter"),
    ({"adapter": "p"}, 400, ".adapter"),
    ({"model": "p"}, 400, ".model"),
    ({"model": "mix"}, 400, ".model"),
    ({"model": "nobody"}, 404, ".model"),
    ({"model": ["small"]}, 400, ".model"),
    ({**SMALL, "own_template": 1}, 400, ".own_template"),
    ({**SMALL, "temperature": 1}, 400, ".temperature"),
    ({**SMALL, "two words": 1}, 400, ".two words"),
    ("small", 400, ""),
    ([SMALL], 400, ""),
    (None, 400, ""),
]

TERMS: list[Bad] = [
    # of a term alone
    *(({**SMALL, "weight": bad}, 400, ".weight") for bad in (None, True, "NaN", "-Infinity", 1e9, -101, 10**300, [1])),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, ""),
    ({"messages": [{"role": "user"}]}, 400, ".messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool"}]}, 400, ".messages[1].content"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "c", "function": {"name": "f", "arguments": "{}"}}]}]},
        400,
        ".messages[0].tool_calls",
    ),
    ({"messages": []}, 400, ".messages"),
    ({"prompt": nested(400)}, 400, ".prompt[0]"),
]  # fmt: skip

PROXIES: list[Bad] = [
    # of a whole proxy
    *(({**PROXY, "alpha": bad}, 400, ".alpha") for bad in (1e9, -101, True, "NaN", "1", [1], 10**300)),
    *(({**PROXY, "base_top_p": bad}, 400, ".base_top_p") for bad in (0, 2, -1, 1.0001, True, "NaN", "0.5", [])),
    ({**PROXY, "gamma": 1}, 400, ".gamma"),
    ({**PROXY, "proxy": PROXY}, 400, ".proxy"),
    ({"expert": SMALL}, 400, ".anti_expert"),
    ({"expert": {}, "anti_expert": SMALL}, 400, ".expert"),
    ({"expert": PROXY, "anti_expert": SMALL}, 400, ".expert.expert"),
    ([PROXY], 400, ""),
]

Case = tuple[str, str, dict[str, Any], int, str]
"""Method, route, body, status, param."""


def steered() -> Iterator[Case]:
    for path, body in BODIES.items():
        for members, status, where in MEMBERS:
            yield "POST", path, {**body, "adapters": members}, status, f"adapters{where}"
        for side, status, where in [*SIDES, *TERMS]:
            whole = {"weight": 1, **side} if isinstance(side, dict) else side
            yield (
                "POST",
                path,
                {**body, "logit_arithmetic": [{"weight": 1}, whole]},
                status,
                f"logit_arithmetic[1]{where}",
            )
        for side, status, where in SIDES:
            yield "POST", path, {**body, "proxy": {**PROXY, "expert": side}}, status, f"proxy.expert{where}"
        for proxy, status, where in PROXIES:
            yield "POST", path, {**body, "proxy": proxy}, status, f"proxy{where}"
        yield (
            "POST",
            path,
            {**body, "proxy": {**PROXY, "anti_expert": {"adapters": []}}},
            400,
            "proxy.anti_expert.adapters",
        )
        yield "POST", path, {**body, "model": "small-mix"}, 400, "model"
        yield "POST", path, {**body, "model": "small-mix", "proxy": PROXY}, 400, "model"
        yield "POST", path, {**body, "model": "p", "adapters": [GOOD]}, 400, "model"
        yield "POST", path, {**body, "model": "small", "adapters": [{"id": "x", "weight": 1}]}, 400, "model"
        yield "POST", path, {**body, "model": "broken"}, 409, "model"
        terms: list[Any] = [{"weight": 1, **SMALL}] * MAX_TERMS
        yield "POST", path, {**body, "logit_arithmetic": [*terms, terms[0]]}, 400, "logit_arithmetic"
        for bad in ([], {}, "x", 5):
            yield "POST", path, {**body, "logit_arithmetic": bad}, 400, "logit_arithmetic"
        yield "POST", path, {**body, "logit_arithmetic": nested(400)}, 400, "logit_arithmetic[0]"


def named_proxies() -> Iterator[Case]:
    for method, path, more in (("POST", "", {"id": "new"}), ("PUT", "/p", {})):
        for name, other in (("expert", "anti_expert"), ("anti_expert", "expert")):
            for side, status, where in SIDES:
                body = {**more, name: side, other: SMALL}
                yield method, f"/admin/proxies{path}", body, status, f"{name}{where}"
        for proxy, status, where in PROXIES:
            if isinstance(proxy, dict):
                yield method, f"/admin/proxies{path}", {**more, **proxy}, status, where.removeprefix(".")
        for base, status in (("nobody", 404), ("x", 400), ("small", 400), ("small-mix", 400), ("p", 400), ("", 400)):
            yield method, f"/admin/proxies{path}", {**more, **PROXY, "base": base}, status, "base"
        yield method, f"/admin/proxies{path}", {**more, **PROXY, "base": "broken"}, 409, "base"


def named_compositions() -> Iterator[Case]:
    for method, path, more in (("POST", "", {"id": "new"}), ("PUT", "/mix", {})):
        for members, status, where in MEMBERS:
            if members != [{"id": "x", "weight": 1}]:  # of a proxy model alone, which can be named
                yield method, f"/admin/compositions{path}", {**more, "adapters": members}, status, f"adapters{where}"
        small = [{"id": "x", "weight": 1}, GOOD]
        yield method, f"/admin/compositions{path}", {**more, "adapters": small}, 400, "adapters[1].id"
        for fields, param in (
            ({"combination": "svd"}, "combination"),
            ({"combination": None}, "combination"),
            ({"description": 5}, "description"),
            ({"description": "x" * 5000}, "description"),
            ({"base": "small"}, "base"),
            ({"model": "base"}, "model"),
        ):
            yield method, f"/admin/compositions{path}", {**more, "adapters": [GOOD], **fields}, 400, param
    yield "PUT", "/admin/compositions/mix", {"adapters": [{"id": "x", "weight": 1}]}, 400, "adapters[0].id"
    yield "POST", "/admin/compositions", {"adapters": [GOOD]}, 400, "id"
    yield "PUT", "/admin/compositions/nobody", {"adapters": [GOOD]}, 404, "id"
    fit = {"save_as": "new", "examples": [{"prompt": "a", "completion": "b"}]}
    for candidates, status, param in (
        (["x"], 400, "candidates"),
        (["x", "y"], 400, "candidates"),
        (["a", "x"], 400, "candidates[1]"),
        (["a", "mix"], 400, "candidates[1]"),
        (["p"], 400, "candidates[0]"),
        (["a", "draining"], 404, "candidates[1]"),
    ):
        yield "POST", "/admin/compositions/fit", {**fit, "candidates": candidates}, status, param


@pytest.fixture
async def whole(served: Served) -> Served:  # noqa: F811
    """With the compositions ``mix``, ``small-mix`` of the proxy model and ``broken``, and the proxy ``p``."""
    registry, named = served.registry, served.state.compositions
    registry.add("b", "vb")
    for id, member in (("mix", "a"), ("small-mix", "x"), ("broken", "b")):
        await named.create(id, [WeighedId(member, 1.0)], "linear")
    await registry.unload("b")
    assert (await served.post("/admin/proxies", {"id": "p", **PROXY}, headers=ADMIN)).status_code == 201
    registry.records["draining"] = replace(registry.add("draining", "vd"), state="draining")
    return served


@pytest.mark.parametrize("cases", [steered, named_proxies, named_compositions])
async def test_what_is_wrong_is_named_where_it_stands(cases: Any, whole: Served) -> None:
    found = []
    for method, path, body, status, param in cases():
        reply = await whole.http.request(method, path, content=json.dumps(body), headers={**ADMIN, **JSON})
        told = f"{method} {path} {json.dumps(body)[:300]}: {reply.status_code} {reply.text[:300]}"
        error = reply.json().get("error", {})
        if (reply.status_code, error.get("param")) != (status, param):
            found.append(f"{told}, not {status} {param!r}")
            continue
        assert set(error) == {"message", "type", "param", "code"} and error["type"] and error["code"], told
        named = param in ("id", "model") or param.split("[")[0].split(".")[0] in error["message"]
        assert named and len(reply.content) < 2000, told
    assert not found, "\n".join(found)
    assert not whole.client.requests and not whole.registry.leases
    assert [one.id for one in whole.state.compositions.list()] == ["broken", "mix", "small-mix"]
    assert [one.id for one in whole.state.proxies.list()] == ["p"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
async def test_numbers_that_json_does_not_have_make_no_body(whole: Served, number: str) -> None:
    for method, path, body in (
        *(("POST", path, {**body, "adapters": [{"id": "a", "weight": 7}]}) for path, body in BODIES.items()),
        *(("POST", path, {**body, "logit_arithmetic": [{"weight": 7}]}) for path, body in BODIES.items()),
        *(("POST", path, {**body, "proxy": {**PROXY, "alpha": 7}}) for path, body in BODIES.items()),
        ("POST", "/admin/proxies", {"id": "new", **PROXY, "base_top_p": 7}),
        ("PUT", "/admin/proxies/p", {**PROXY, "alpha": 7}),
        ("POST", "/admin/compositions", {"id": "new", "adapters": [{"id": "a", "weight": 7}]}),
        ("PUT", "/admin/compositions/mix", {"adapters": [{"id": "a", "weight": 7}]}),
    ):
        content = json.dumps(body).replace("7", number)
        reply = await whole.http.request(method, path, content=content, headers={**ADMIN, **JSON})
        error = reply.json()["error"]
        # Nothing was read that could be named; the message says where it is.
        assert (reply.status_code, error["param"], error["code"]) == (400, None, "invalid_json"), content
        assert abs(int(error["message"].rpartition(" ")[2]) - content.index(number)) <= 1


@pytest.mark.parametrize("depth", [1020, 100_000])
async def test_bodies_that_go_too_deep(whole: Served, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for path, content in (
        ("/v1/completions", f'{{"model": "base", "prompt": "x", "logit_arithmetic": {deep}}}'),
        ("/v1/completions", f'{{"model": "base", "prompt": "x", "proxy": {{"expert": {{"adapters": {deep}}}}}}}'),
        ("/admin/compositions", f'{{"id": "new", "adapters": {deep}}}'),
        ("/admin/proxies", f'{{"id": "new", "expert": {{"adapters": {deep}}}, "anti_expert": {{"model": "small"}}}}'),
    ):
        reply = await whole.http.post(path, content=content, headers={**ADMIN, **JSON})
        assert reply.status_code == 400 and reply.json()["error"]["message"] and len(reply.content) < 2000


@pytest.mark.parametrize(
    ("fields", "engine", "param"),
    [
        ({"adapters": [GOOD]}, "adapters[0]", "adapters[0]"),
        ({"model": "mix"}, "adapters[0]", "model"),
        (
            {"logit_arithmetic": [{"weight": 1}, {"weight": 1, "adapters": [GOOD]}]},
            "logit_arithmetic[0].adapters[0]",
            "logit_arithmetic[1].adapters[0]",
        ),
        (
            {"logit_arithmetic": [{"weight": 1, "adapter": "mix"}]},
            "logit_arithmetic[0].adapters[0]",
            "logit_arithmetic[0].adapter",
        ),
        (
            {"proxy": {**PROXY, "anti_expert": {**SMALL, "adapters": [{"id": "y", "weight": 1}]}}},
            "logit_arithmetic[1].adapters[0]",
            "proxy.anti_expert.adapters[0]",
        ),
        (
            {"proxy": {**PROXY, "expert": {**SMALL, "adapter": "small-mix"}}},
            "logit_arithmetic[0].adapters",
            "proxy.expert.adapter",
        ),
    ],
)
async def test_members_that_the_engine_cannot_compose_are_named_in_the_body(
    fields: dict[str, Any], engine: str, param: str, whole: Served
) -> None:
    for path, body in BODIES.items():
        whole.client.fail = InvalidRequest(f"{engine.split('.')[0]}: it is no LoRA", param=engine)
        error = await whole.error(path, {**body, **fields}, 400)
        assert error["param"] == param and "no LoRA" in error["message"]
