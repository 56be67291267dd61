"""``proxy``, ``logit_arithmetic`` and named proxies, on a fake engine: what it is asked, and what never reaches it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.conftest import ADMIN, Served, events
from tests.http.fakes import MAX_MODEL_LEN, byte_level_tokenizer
from weft.adapters.choices import Choice
from weft.adapters.composition import Composition, Member
from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.errors import InvalidRequest
from weft.server.http.steering import MAX_TERMS
from weft.server.registry.compositions import WeighedId
from weft.server.registry.names import Names
from weft.server.registry.proxies import NamedProxy, Proxies, Stream
from weft.server.tokenization import Tokenizer

OTHER_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
PROXY = {"expert": {"model": "small", "adapter": "x"}, "anti_expert": {"model": "small"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "base", "prompt": "the cat"},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def served(served: Served) -> Served:
    """With the proxy model ``small``, its adapters ``x`` and ``y``, and the main model's ``a`` and ``t``."""
    client, registry = served.client, served.registry
    small = replace(client.info, model="small", max_model_len=MAX_MODEL_LEN // 2)
    client.info = replace(client.info, proxies={"small": small})
    registry.names.base_names = (*registry.names.base_names, "small")
    for id in ("x", "y"):
        registry.records[id] = replace(registry.add(id, f"version-of-{id}"), base="small")
    record = registry.add("t", "version-of-t")
    info = replace(record.info, choices=(Choice("task_id", 0, 2),))
    registry.records["t"] = replace(record, info=info)
    served.state.proxy_tokenizers["small"] = Tokenizer(  # type: ignore[index]
        byte_level_tokenizer(chat_template=OTHER_TEMPLATE), max_model_len=MAX_MODEL_LEN
    )
    return served


async def asked(served: Served, path: str = "/v1/completions", **fields: Any) -> LogitArithmetic:
    """What the engine is asked to add."""
    reply = await served.post(path, {**BODIES[path], **fields})
    assert reply.status_code == 200, reply.text
    arithmetic = served.client.requests[-1].arithmetic
    assert arithmetic is not None and not served.registry.leases
    return arithmetic


async def named(served: Served, **fields: Any) -> Any:
    reply = await served.post("/admin/proxies", {"id": "p", **PROXY, **fields}, headers=ADMIN)
    assert reply.status_code == 201, reply.text
    return reply.json()


EXPERT = Term(1.0, "small", "version-of-x", "x")
ANTI_EXPERT = Term(-1.0, "small")


@pytest.mark.parametrize("path", BODIES)
async def test_a_proxy_is_an_expert_and_an_anti_expert(path: str, served: Served) -> None:
    assert await asked(served, path, proxy=PROXY) == LogitArithmetic((EXPERT, ANTI_EXPERT))
    steered = await asked(served, path, proxy={**PROXY, "alpha": 0.5, "base_top_p": 0.9})
    assert steered == LogitArithmetic((replace(EXPERT, weight=0.5), replace(ANTI_EXPERT, weight=-0.5)), top_p=0.9)
    assert (await asked(served, path, proxy={**PROXY, "alpha": 0})).terms[0].weight == 0
    assert (await asked(served, path, proxy={**PROXY, "alpha": None})).terms[0].weight == 1
    request = served.client.requests[-1]
    assert request.adapter is None and request.adapter_name is None
    assert set(served.client.holding[request.request_id]) == {"x"}


async def test_a_proxy_of_adapters_of_the_main_model(served: Served) -> None:
    for name in ("base", "alias/of-base"):
        proxy = {"expert": {"adapter": "a"}, "anti_expert": {"model": name}}
        steered = await asked(served, model="t", task_id=1, proxy=proxy)
        assert steered == LogitArithmetic((Term(1.0, None, "v1", "a"), Term(-1.0)))
    request = served.client.requests[-1]
    assert (request.adapter, request.adapter_name, request.choices) == ("version-of-t", "t", {"task_id": 1})
    assert set(served.client.holding[request.request_id]) == {"t", "a"}


async def test_the_general_form(served: Served) -> None:
    terms = [{"model": "small", "adapter": "y", "weight": 2}, {"weight": 0.25}, {"adapter": "a", "weight": -0.5}]
    steered = await asked(served, logit_arithmetic=terms, base_top_p=0.5)
    expected = (Term(2.0, "small", "version-of-y", "y"), Term(-0.5, None, "v1", "a"))
    assert steered == LogitArithmetic(expected, weight=0.25, top_p=0.5)
    steered = await asked(served, logit_arithmetic=[{"adapter": "t", "task_id": 2, "weight": 1}])
    assert steered.terms == (Term(1.0, None, "version-of-t", "t", choices={"task_id": 2}),)


async def test_a_term_that_names_neither_model_nor_adapter_runs_with_what_the_request_runs_with(served: Served) -> None:
    terms: list[dict[str, Any]] = [{"prompt": "a dog", "weight": -1}, {"model": "base", "weight": 1}]
    steered = await asked(served, model="t", task_id=2, logit_arithmetic=[*terms, {"task_id": 0, "weight": 3}])
    prompt = served.tokenizer.encode("a dog")
    of_t = Term(-1.0, None, "version-of-t", "t", choices={"task_id": 2}, prompt_token_ids=prompt)
    of_0 = Term(3.0, None, "version-of-t", "t", choices={"task_id": 0})
    assert steered == LogitArithmetic((of_t, Term(1.0), of_0))


async def test_terms_may_be_compositions(served: Served) -> None:
    await served.state.compositions.create("mix", [WeighedId("a", 0.5)], "linear")
    terms = [
        {"model": "small", "adapters": [{"id": "x", "weight": 1}, {"id": "y", "weight": -2}], "weight": 1},
        {"adapter": "mix", "weight": 1},
    ]
    first, second = (await asked(served, logit_arithmetic=terms)).terms
    members = (Member("version-of-x", 1.0), Member("version-of-y", -2.0))
    assert first.composition == Composition(members, "lorahub") and first.model == "small" and first.adapter is None
    assert second.composition == Composition((Member("v1", 0.5),), "linear") and second.adapter_name == "mix"
    assert set(served.client.holding[served.client.requests[-1].request_id]) == {"x", "y", "a"}


async def test_prompts_of_terms(served: Served) -> None:
    messages = [{"role": "user", "content": "no"}]
    terms = [
        {"prompt": [5, 6], "weight": 1},
        {"prompt": "the fox", "weight": 1},
        {"messages": messages, "weight": 1},
        {"messages": messages, "model": "small", "own_template": True, "weight": 1},
    ]
    text = served.tokenizer.encode
    expected = [
        [5, 6],
        text("the fox"),
        text("<s><|user|>no</s><|assistant|>", add_special_tokens=False),
        text("<s>no", add_special_tokens=False),
    ]
    for path in BODIES:
        given = [term.prompt_token_ids for term in (await asked(served, path, logit_arithmetic=terms)).terms]
        assert given == expected
    assert (await asked(served, logit_arithmetic=terms, add_special_tokens=False)).terms[1].prompt_token_ids == text(
        "the fox", add_special_tokens=False
    )


async def test_chats_may_be_rendered_by_each_models_own_template(served: Served) -> None:
    path = "/v1/chat/completions"
    own = {"expert": {"model": "small", "adapter": "x", "own_template": True}, "anti_expert": {"adapter": "a"}}
    expert, anti_expert = (await asked(served, path, proxy=own)).terms
    assert expert.prompt_token_ids == served.tokenizer.encode("<s>hi", add_special_tokens=False)
    assert anti_expert.prompt_token_ids is None
    refused = await served.error("/v1/completions", {**BODIES["/v1/completions"], "proxy": own}, 400)
    assert refused["param"] == "proxy.expert.own_template"
    await named(served, expert=own["expert"])
    expert, _ = (await asked(served, path, model="p")).terms
    assert expert.prompt_token_ids == served.tokenizer.encode("<s>hi", add_special_tokens=False)
    assert (await served.error("/v1/completions", {"model": "p", "prompt": "x"}, 400))["param"] == "model"


def term(**fields: Any) -> dict[str, Any]:
    return {"logit_arithmetic": [{"model": "small", "weight": 1}, {"weight": 1, **fields}]}


def proxy(**fields: Any) -> dict[str, Any]:
    return {"proxy": {**PROXY, **fields}}


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    # the body's fields, the status, the error's param
    (proxy(expert={"model": "big"}), 404, "proxy.expert.model"),
    (proxy(expert={"model": "small", "adapter": "z"}), 404, "proxy.expert.adapter"),
    (proxy(anti_expert={"adapter": "z"}), 404, "proxy.anti_expert.adapter"),
    (proxy(expert={"adapter": "x"}), 400, "proxy.expert.adapter"),
    (proxy(expert={"model": "small", "adapter": "a"}), 400, "proxy.expert.adapter"),
    (proxy(expert={"model": "x"}), 400, "proxy.expert.model"),
    (proxy(expert={"model": "p"}), 400, "proxy.expert.model"),
    (proxy(expert={"adapter": "p"}), 400, "proxy.expert.adapter"),
    (proxy(expert={"adapter": "small"}), 400, "proxy.expert.adapter"),
    (proxy(expert={"adapter": "base"}), 400, "proxy.expert.adapter"),
    (proxy(expert={}), 400, "proxy.expert"),
    (proxy(anti_expert={"own_template": True}), 400, "proxy.anti_expert"),
    (proxy(expert=None), 400, "proxy.expert"),
    (proxy(expert={"adapter": "t"}), 400, "proxy.expert.task_id"),
    (proxy(expert={"adapter": "t", "task_id": 3}), 400, "proxy.expert.task_id"),
    (proxy(expert={"adapter": "a", "task_id": 0}), 400, "proxy.expert.task_id"),
    (proxy(expert={"model": "small", "prompt": "x"}), 400, "proxy.expert.prompt"),
    (proxy(expert={"model": "small", "weight": 1}), 400, "proxy.expert.weight"),
    (proxy(expert={"model": "small", "bogus": 1}), 400, "proxy.expert.bogus"),
    (proxy(alpha=101), 400, "proxy.alpha"),
    (proxy(alpha=-1e308), 400, "proxy.alpha"),
    (proxy(alpha="1"), 400, "proxy.alpha"),
    (proxy(alpha=True), 400, "proxy.alpha"),
    (proxy(base_top_p=0), 400, "proxy.base_top_p"),
    (proxy(base_top_p=1.1), 400, "proxy.base_top_p"),
    ({"proxy": {"expert": {"model": "small"}}}, 400, "proxy.anti_expert"),
    ({"proxy": {"anti_expert": {"model": "small"}}}, 400, "proxy.expert"),
    ({"proxy": {}}, 400, "proxy.expert"),
    ({"proxy": []}, 400, "proxy"),
    ({**proxy(), "logit_arithmetic": [{"model": "small", "weight": 1}]}, 400, "proxy"),
    ({**proxy(), "model": "p"}, 400, "proxy"),
    ({**term(), "model": "p"}, 400, "logit_arithmetic"),
    ({**proxy(), "base_top_p": 0.9}, 400, "base_top_p"),
    ({"base_top_p": 0.9}, 400, "base_top_p"),
    ({"logit_arithmetic": []}, 400, "logit_arithmetic"),
    ({"logit_arithmetic": [{"model": "small", "weight": 1}] * (MAX_TERMS + 1)}, 400, "logit_arithmetic"),
    ({"logit_arithmetic": [{"weight": 1}, {"weight": 1}]}, 400, "logit_arithmetic[1]"),
    ({"logit_arithmetic": [{"model": "small"}]}, 400, "logit_arithmetic[0].weight"),
    (term(model="big"), 404, "logit_arithmetic[1].model"),
    (term(adapter="z"), 404, "logit_arithmetic[1].adapter"),
    (term(adapter="x"), 400, "logit_arithmetic[1].adapter"),
    (term(model="p"), 400, "logit_arithmetic[1].model"),
    (term(adapters=[{"id": "x", "weight": 1}]), 400, "logit_arithmetic[1].adapters[0].id"),
    (term(adapters=[{"id": "z", "weight": 1}]), 404, "logit_arithmetic[1].adapters[0].id"),
    (term(adapters=[]), 400, "logit_arithmetic[1].adapters"),
    (term(adapter="a", adapters=[{"id": "a", "weight": 1}]), 400, "logit_arithmetic[1].adapters"),
    (term(combination="linear"), 400, "logit_arithmetic[1].combination"),
    (term(weight=1e9), 400, "logit_arithmetic[1].weight"),
    ({**term(prompt=""), "add_special_tokens": False}, 400, "logit_arithmetic[1]"),
    (term(prompt=[]), 400, "logit_arithmetic[1].prompt"),
    (term(prompt=[-1]), 400, "logit_arithmetic[1].prompt[0]"),
    (term(prompt=[10**6]), 400, "logit_arithmetic[1]"),
    (term(prompt=["x"]), 400, "logit_arithmetic[1].prompt[0]"),
    (term(prompt=5), 400, "logit_arithmetic[1].prompt"),
    (term(prompt="x " * 5000), 400, "logit_arithmetic[1].prompt"),
    (term(prompt=[5] * MAX_MODEL_LEN), 400, "logit_arithmetic[1]"),
    (term(model="small", prompt=[5] * (MAX_MODEL_LEN // 2)), 400, "logit_arithmetic[1]"),
    (term(messages=[{"role": "tool", "content": "x"}]), 400, "logit_arithmetic[1].messages"),
    (term(messages=[], prompt="x"), 400, "logit_arithmetic[1].messages"),
    (term(messages=[{"role": "user", "content": "x"}], prompt="x"), 400, "logit_arithmetic[1]"),
    ({**proxy(), "max_tokens": MAX_MODEL_LEN // 2}, 400, "proxy.expert"),
    ({"model": "x"}, 400, "model"),
    ({"model": "small"}, 400, "model"),
    ({**proxy(), "model": "x"}, 400, "model"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "status", "param"), REFUSED)
async def test_what_cannot_be_served_reaches_no_engine(
    path: str, fields: dict[str, Any], status: int, param: str, stream: bool, served: Served
) -> None:
    await named(served)
    error = await served.error(path, {"max_tokens": 8, **BODIES[path], "stream": stream, **fields}, status)
    assert error["param"] == param
    assert not served.client.requests and not served.registry.leases


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(value: str, served: Served) -> None:
    for field, param in (
        ('"proxy": {"alpha": V}', "proxy"),
        ('"logit_arithmetic": [{"weight": V}]', "logit_arithmetic"),
    ):
        body = '{"model": "base", "prompt": "x", ' + field.replace("V", value) + "}"
        reply = await served.http.post("/v1/completions", content=body, headers=JSON)
        assert reply.status_code == 400
        assert value == "1e999" or reply.json()["error"]["code"] in ("invalid_json", "invalid_value"), param


async def test_log_probabilities_of_the_prompt_are_asked_of_the_engine(served: Served) -> None:
    body = {**BODIES["/v1/completions"], **proxy(), "echo": True, "logprobs": 3, "max_tokens": 0}
    reply = await served.post("/v1/completions", body)
    prompt = served.client.requests[-1].prompt_token_ids
    assert len(reply.json()["choices"][0]["logprobs"]["token_logprobs"]) == len(prompt)
    assert served.client.requests[-1].params.prompt_logprobs == 3
    await asked(served, "/v1/chat/completions", **proxy(), prompt_logprobs=1)
    assert served.client.requests[-1].params.prompt_logprobs == 1


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        (proxy(), "logit_arithmetic[1]", "proxy.anti_expert"),
        (term(adapter="a"), "logit_arithmetic[1]", "logit_arithmetic[1]"),
        (
            {"logit_arithmetic": [{"weight": 1}, {"adapter": "a", "weight": 1}]},
            "logit_arithmetic[0]",
            "logit_arithmetic[1]",
        ),
        (proxy(), "logit_arithmetic", "proxy"),
        ({"model": "p"}, "logit_arithmetic", "model"),
        ({"model": "p"}, "logit_arithmetic[0]", "expert"),
        (proxy(), "prompt", "prompt"),
    ],
)
async def test_the_engines_errors_name_the_requests_fields(
    fields: dict[str, Any], param: str, expected: str, served: Served
) -> None:
    await named(served)
    served.client.fail = InvalidRequest(f"{param}: no room", param=param, code="c")
    error = await served.error("/v1/completions", {**BODIES["/v1/completions"], **fields}, 400)
    assert (error["param"], error["message"], error["code"]) == (expected, f"{expected}: no room", "c")


async def test_streams_count_as_sequences(served: Served) -> None:
    limit = served.state.limits.max_sequences
    body = {**BODIES["/v1/completions"], **proxy(), "prompt": [[5]] * (limit // 8), "n": 4}
    error = await served.error("/v1/completions", body, 400)
    assert error["param"] == "n" and "3 streams" in error["message"]


async def test_a_steered_request_streams_and_is_accounted_under_its_own_model(served: Served) -> None:
    reply = await served.post("/v1/completions", {**BODIES["/v1/completions"], **proxy(), "model": "a", "stream": True})
    assert events(reply)[-1] == "[DONE]"
    request = served.client.requests[-1]
    assert request.adapter_name == "a" and request.arithmetic is not None
    text = (await served.http.get("/metrics")).text
    assert 'weft_requests_total{adapter="a",finish_reason="stop"} 1.0' in text
    assert 'adapter="x",finish_reason' not in text


# --- named proxies ---


async def test_a_named_proxy_is_a_model(served: Served) -> None:
    card = await named(served, base="a", alpha=0.5, base_top_p=0.75)
    assert card == {
        "id": "p", "object": "proxy", "created": card["created"], "state": "ready", "error": None, "base": "a",
        **PROXY, "alpha": 0.5, "base_top_p": 0.75, "revision": card["revision"],
    }  # fmt: skip
    for path in BODIES:
        steered = await asked(served, path, model="p")
        assert steered == LogitArithmetic((replace(EXPERT, weight=0.5), replace(ANTI_EXPERT, weight=-0.5)), top_p=0.75)
        request = served.client.requests[-1]
        assert (request.adapter, request.adapter_name) == ("v1", "p")
        assert set(served.client.holding[request.request_id]) == {"a", "x"}
    models = {model["id"]: model for model in (await served.http.get("/v1/models")).json()["data"]}
    assert models["p"]["parent"] == "a" and "proxy_only" not in models["p"]
    assert models["x"]["parent"] == "small" and models["x"]["proxy_only"] and models["small"]["proxy_only"]
    assert models["a"]["parent"] == "base" and "proxy_only" not in models["a"]
    for name, model in models.items():
        assert (await served.http.get(f"/v1/models/{name}")).json() == model
    assert (await served.http.get("/admin/proxies/p", headers=ADMIN)).json() == card
    assert (await served.http.get("/admin/proxies", headers=ADMIN)).json()["data"] == [card]
    await served.error("/v1/completions", {"model": "p", "prompt": "x", "task_id": 0}, 400)
    adapters = {"adapters": [{"id": "a", "weight": 1}]}
    assert (await served.error("/v1/completions", {"model": "p", "prompt": "x", **adapters}, 400))["param"] == "model"


async def test_a_named_proxys_ids_are_everyones(served: Served) -> None:
    await served.state.compositions.create("mix", [WeighedId("a", 1.0)], "linear")
    for taken in ("a", "x", "mix"):
        error = await served.error("/admin/proxies", {"id": taken, **PROXY}, 409, headers=ADMIN)
        assert error["param"] == "id"
    for bad in ("base", "small", "a/b", "..", "x,y"):
        error = await served.error("/admin/proxies", {"id": bad, **PROXY}, 400, headers=ADMIN)
        assert error["param"] == "id"
    await named(served)
    for path, body in (
        ("/admin/proxies", {"id": "p", **PROXY}),
        ("/admin/adapters", {"id": "p", "source": "/x"}),
    ):
        assert (await served.error(path, body, 409, headers=ADMIN))["code"] == "proxy_exists"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"base": "z"}, 404, "base"),
        ({"base": "x"}, 400, "base"),
        ({"base": "small"}, 400, "base"),
        ({"base": "q"}, 400, "base"),
        ({"expert": {"model": "small", "adapter": "z"}}, 404, "expert.adapter"),
        ({"expert": {"model": "big"}}, 404, "expert.model"),
        ({"expert": {"adapter": "q"}}, 400, "expert.adapter"),
        ({"anti_expert": {"model": "q"}}, 400, "anti_expert.model"),
        ({"anti_expert": {}}, 400, "anti_expert"),
        ({"anti_expert": {"adapter": "t"}}, 400, "anti_expert.task_id"),
        ({"alpha": 1e9}, 400, "alpha"),
        ({"bogus": 1}, 400, "bogus"),
    ],
)
async def test_a_proxy_that_could_not_be_served_is_not_named(
    fields: dict[str, Any], status: int, param: str, served: Served
) -> None:
    await named(served, id="q")
    error = await served.error("/admin/proxies", {"id": "p", **PROXY, **fields}, status, headers=ADMIN)
    assert error["param"] == param and not served.registry.leases
    assert served.state.proxies.find("p") is None
    assert (await served.http.get("/admin/proxies/p", headers=ADMIN)).status_code == 404


async def test_replace_needs_the_revision_it_is_given(served: Served, tmp_path: Path) -> None:
    async def put(body: Any, status: int = 200, **headers: str) -> Any:
        reply = await served.http.put("/admin/proxies/p", json=body, headers={**ADMIN, **headers})
        assert reply.status_code == status, reply.text
        assert status != 200 or reply.headers["etag"] == f'"{reply.json()["revision"]}"'
        return reply.json()

    await put(PROXY, 404)
    reply = await served.post("/admin/proxies", {"id": "q", **PROXY}, headers=ADMIN)
    assert reply.headers["etag"] == f'"{reply.json()["revision"]}"'
    await served.state.proxies.keep(NamedProxy("p", 5, Stream("small", "x"), Stream("small")))
    shown = await served.http.get("/admin/proxies/p", headers=ADMIN)
    etag = shown.headers["etag"]
    assert etag == reply.headers["etag"], "it is of what requests see"
    assert await put(PROXY) == shown.json()

    other = {"expert": {"adapter": "a"}, "anti_expert": {"model": "base"}, "alpha": 2, "base": "t", "base_top_p": 0.5}
    for stale in ('"other"', "other", '""'):
        error = (await put(other, 412, **{"If-Match": stale}))["error"]
        assert error["code"] == "precondition_failed" and error["type"] == "conflict_error"
    new = await put(other, **{"If-Match": etag})
    assert (new["created"], new["id"], new["alpha"]) == (5, "p", 2.0) and new["revision"] != shown.json()["revision"]
    assert (await put(other, 412, **{"If-Match": etag}))["error"]["param"] == "if_match"
    steered = await asked(served, model="p", task_id=0)
    assert steered == LogitArithmetic((Term(2.0, None, "v1", "a"), Term(-2.0)), top_p=0.5)
    await put({**other, "alpha": 1}, **{"If-Match": "*"})
    await put({**other, "base": "p"}, 400)  # and what is refused changes nothing
    served.registry.names = Names(served.registry.names.base_names)
    again = Proxies(tmp_path / "state-0", served.registry)  # type: ignore[arg-type]
    assert again.get("p") == served.state.proxies.get("p") and again.get("p").alpha == 1


async def test_requests_under_way_finish_with_the_proxy_they_started_with(served: Served) -> None:
    await named(served)
    await served.state.compositions.create("xy", [WeighedId("x", 0.5), WeighedId("y", 0.5)], "linear")
    await named(served, id="q", expert={"model": "small", "adapter": "xy"})
    gate = served.client.gate = asyncio.Semaphore(0)
    first = [asyncio.create_task(served.complete(model=id)) for id in "pq"]
    while len(served.client.requests) < 2:
        await asyncio.sleep(0.01)
    assert sorted(served.registry.leases) == ["x", "x", "y"]
    served.client.gate = None
    for path, body in (
        ("proxies/p", {**PROXY, "alpha": 3}),
        ("adapters/x", {"source": "/new"}),
        ("compositions/xy", {"adapters": [{"id": "y", "weight": 2}], "combination": "linear"}),
    ):
        reply = await served.http.put(f"/admin/{path}", json=body, headers=ADMIN)
        assert reply.status_code == 200, reply.text
    assert sorted(served.registry.leases) == ["x", "x", "y"], "those under way hold what they started with"
    for _ in first:
        gate.release()
    await asyncio.gather(*first)
    old = [request.arithmetic.terms[0] for request in served.client.requests[:2] if request.arithmetic]
    xy = Composition((Member("version-of-x", 0.5), Member("version-of-y", 0.5)), "linear")
    assert old == [EXPERT, Term(1.0, "small", None, "xy", xy)]
    assert (await asked(served, model="p")).terms[0] == Term(3.0, "small", "version-of-x+", "x")
    changed = Composition((Member("version-of-y", 2.0),), "linear")
    assert (await asked(served, model="q")).terms[0] == Term(1.0, "small", None, "xy", changed)


async def test_members_come_and_go(served: Served) -> None:
    await named(served)
    await served.registry.replace("x", "/new")
    assert (await asked(served, model="p")).terms[0].adapter == "version-of-x+"
    await served.registry.unload("x")
    error = await served.error("/v1/completions", {"model": "p", "prompt": "x"}, 409)
    assert error["code"] == "proxy_broken" and error["param"] == "model" and "'x'" in error["message"]
    card = (await served.http.get("/admin/proxies/p", headers=ADMIN)).json()
    assert card["state"] == "broken" and card["error"] == error["message"]
    assert "p" not in [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]]
    await served.registry.load("x", "/x", base="small")
    assert (await asked(served, model="p")).terms[0].adapter == "v1"
    assert (await served.http.get("/admin/proxies/p", headers=ADMIN)).json()["state"] == "ready"


async def test_named_proxies_survive_a_restart(served: Served, tmp_path: Any) -> None:
    expert = {"model": "small", "adapters": [{"id": "x", "weight": 0.5}], "combination": "linear", "own_template": True}
    before = await named(served, expert=expert, alpha=2)
    registry = served.registry
    registry.names = Names(registry.names.base_names)
    again = Proxies(tmp_path / "state-0", registry)  # type: ignore[arg-type]
    assert again.list() == served.state.proxies.list()
    assert registry.names.known("p")
    assert before["expert"] == expert
    await again.delete("p")
    assert Proxies(tmp_path / "state-0", registry).list() == []  # type: ignore[arg-type]


async def test_a_deleted_proxy_is_gone(served: Served) -> None:
    await named(served)
    gone: list[str] = []
    served.registry.on_unloaded.append(gone.append)
    reply = await served.http.delete("/admin/proxies/p", headers=ADMIN)
    assert reply.json() == {"id": "p", "object": "proxy", "deleted": True} and gone == ["p"]
    assert (await served.http.delete("/admin/proxies/p", headers=ADMIN)).status_code == 404
    await served.error("/v1/completions", {"model": "p", "prompt": "x"}, 404)
    await named(served)


async def test_the_admin_api_needs_its_key(served: Served) -> None:
    await served.error("/admin/proxies", {"id": "p", **PROXY}, 401)
    assert (await served.http.get("/admin/proxies")).status_code == 401


async def test_adapters_are_loaded_for_a_base(served: Served) -> None:
    body = {"id": "new", "source": "/new", "base": "small"}
    reply = await served.post("/admin/adapters", body, headers=ADMIN)
    assert reply.status_code == 201 and reply.json()["base"] == "small"
    body = {"id": "other", "source": "/other", "base": "base"}
    assert (await served.post("/admin/adapters", body, headers=ADMIN)).json()["base"] is None
    error = await served.error("/admin/adapters", {**body, "id": "third", "base": "big"}, 400, headers=ADMIN)
    assert error["param"] == "base" and "'small'" in error["message"]


# --- any JSON at all ---

NAMES = st.sampled_from(["base", "small", "a", "x", "t", "p", "z", "", None, 5])
STREAM = st.dictionaries(
    st.sampled_from(
        ["model", "adapter", "adapters", "combination", "task_id", "own_template", "weight", "prompt", "y"]
    ),
    st.one_of(NAMES, st.booleans(), st.floats(), st.lists(NAMES, max_size=3), st.integers(-1, 3), st.just([[]])),
    max_size=4,
)
STEERED = st.fixed_dictionaries(
    {"model": st.sampled_from(["base", "a", "p"])},
    optional={
        "proxy": st.fixed_dictionaries(
            {"expert": STREAM, "anti_expert": st.one_of(STREAM, st.just({"model": "small"}))},
            optional={"alpha": st.floats(), "base_top_p": st.floats(0, 1), "z": st.none()},
        ),
        "logit_arithmetic": st.lists(STREAM, max_size=MAX_TERMS + 1),
        "base_top_p": st.floats(-1, 2),
        "stream": st.booleans(),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(BODIES)), fields=STEERED)
async def test_no_steering_gives_a_server_error(served: Served, path: str, fields: dict[str, Any]) -> None:
    if served.state.proxies.find("p") is None:
        await named(served)
    body = json.dumps({**BODIES[path], **fields, "max_tokens": 2})
    reply = await served.http.post(path, content=body, headers=JSON)
    assert reply.status_code < 500, reply.text
    assert not served.registry.leases
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]
