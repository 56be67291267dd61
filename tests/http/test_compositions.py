"""Adapters composed for one request, named compositions, and the search for weights as a job."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.conftest import ADMIN, Serve, Served, events
from weft.adapters.composition import Composition, Member
from weft.server.config import ConfigError
from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.engine.request import COMPOSED
from weft.server.errors import EngineUnavailable, InvalidRequest, Overloaded
from weft.server.http.stream import DONE
from weft.server.registry import compositions as named
from weft.server.registry.compositions import Compositions, NamedComposition, WeighedId

PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the cat"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
AB = [{"id": "a", "weight": 0.5}, {"id": "b", "weight": -1}]
EXAMPLES = [{"prompt": "the", "completion": " cat"}, {"prompt": "a", "completion": " dog"}]
FIT = {"candidates": ["a", "b"], "examples": EXAMPLES, "save_as": "mix"}


@pytest.fixture
def served(served: Served) -> Served:
    """With the adapters ``a`` and ``b``."""
    served.registry.add("b", "v2")
    return served


async def admin(served: Served, method: str, path: str, body: Any = None, **headers: str) -> Any:
    content = None if body is None else json.dumps(body)
    kind = {"Content-Type": "application/json"}
    return await served.http.request(method, f"/admin{path}", content=content, headers={**ADMIN, **kind, **headers})


async def create(served: Served, id: str = "ab", **fields: Any) -> Any:
    reply = await admin(served, "POST", "/compositions", {"id": id, "adapters": AB, **fields})
    assert reply.status_code == 201, reply.text
    return reply.json()


# --- for one request ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_composes(path: str, stream: bool, served: Served) -> None:
    for fields, combination in (({}, "lorahub"), ({"combination": "linear"}, "linear")):
        body = {"model": "base", **PATHS[path], "adapters": AB, **fields, "stream": stream}
        reply = await served.post(path, body | ({"stream_options": {"include_usage": True}} if stream else {}))
        assert reply.status_code == 200, reply.text
        request = served.client.requests[-1]
        assert request.composition == Composition((Member("v1", 0.5), Member("v2", -1.0)), combination)
        assert request.adapter is None and request.adapter_name == COMPOSED
        assert served.client.holding[request.request_id] == ("a", "b")
        usage = events(reply)[-2]["usage"] if stream else reply.json()["usage"]
        assert usage["weft"] == {"compose_ms": 2.5}
    assert served.registry.leases == []


async def test_who_composes_nothing_is_told_nothing_of_it(served: Served) -> None:
    assert "weft" not in (await served.complete())["usage"]
    assert "weft" not in (await served.complete(model="a"))["usage"]


async def test_choices_and_prompts_share_a_composition(served: Served) -> None:
    await served.complete(adapters=AB, n=2, prompt=["x", "y"])
    assert len({request.composition for request in served.client.requests}) == 1
    assert len(served.client.requests) == 4


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": "a"}, 400, "adapters"),
        ({"adapters": {"id": "a", "weight": 1}}, 400, "adapters"),
        ({"adapters": [{"id": "a", "weight": 1}] * 65}, 400, "adapters"),
        ({"adapters": [{"id": "a"}]}, 400, "adapters[0].weight"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters[0].id"),
        ({"adapters": [{"id": "a", "weight": "1"}]}, 400, "adapters[0].weight"),
        ({"adapters": [{"id": "a", "weight": True}]}, 400, "adapters[0].weight"),
        ({"adapters": [{"id": "a", "weight": 1e9}]}, 400, "adapters[0].weight"),
        ({"adapters": [{"id": "a", "weight": float("nan")}]}, 400, ""),
        ({"adapters": [{"id": "a", "weight": float("inf")}]}, 400, ""),
        ({"adapters": [{"id": "a", "weight": 10**400}]}, 400, ""),
        ({"adapters": [{"id": "a", "weight": 1, "x": 1}]}, 400, "adapters[0].x"),
        ({"adapters": [*AB, {"id": "a", "weight": 1}]}, 400, "adapters[2].id"),
        ({"adapters": [AB[0], {"id": "nope", "weight": 1}]}, 404, "adapters[1].id"),
        ({"adapters": [AB[0], {"id": "base", "weight": 1}]}, 404, "adapters[1].id"),
        ({"adapters": [AB[0], {"id": "named", "weight": 1}]}, 400, "adapters[1].id"),
        ({"adapters": [{"id": "", "weight": 1}]}, 400, "adapters[0].id"),
        ({"adapters": AB, "combination": "svd"}, 400, "combination"),
        ({"adapters": AB, "combination": 1}, 400, "combination"),
        ({"combination": "linear"}, 400, "combination"),
        ({"adapters": AB, "model": "a"}, 400, "model"),
        ({"adapters": AB, "model": "named"}, 400, "model"),
        ({"adapters": AB, "task_id": 1}, 400, "task_id"),
        ({"model": "named", "lora_rank": 1}, 400, "lora_rank"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_what_cannot_be_composed_reaches_no_engine(
    path: str, stream: bool, fields: dict, status: int, param: str, served: Served
) -> None:
    await create(served, "named")
    served.client.requests.clear()
    body = {"model": "base", **PATHS[path], **fields, "stream": stream}
    reply = await served.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["param"] or "").startswith(param) and param.split("[")[0] in error["message"]
    assert not served.client.requests and served.registry.leases == []


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_refusal_has_its_own_status(stream: bool, served: Served) -> None:
    served.client.fail = InvalidRequest("adapters[1] cannot be composed: it is no LoRA", param="adapters[1]")
    body = {"model": "base", "prompt": "x", "adapters": AB, "stream": stream}
    error = await served.error("/v1/completions", body, 400)
    assert error["param"] == "adapters[1]"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "adapters": st.recursive(
                st.one_of(st.none(), st.text(max_size=3), st.floats(), st.integers(), st.just("a")),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["id", "weight", "x"]), inner, max_size=3)
                ),
                max_leaves=8,
            ),
            "combination": st.sampled_from(["linear", "lorahub", "", None, 1, ["linear"]]),
            "model": st.sampled_from(["base", "a", "x", ""]),
        },
    ),
    path=st.sampled_from(
        ["/v1/completions", "/admin/compositions", "/admin/compositions/fit", "/admin/compositions/a"]
    ),
)
async def test_no_composition_gives_a_server_error(served: Served, fields: dict[str, Any], path: str) -> None:
    rest: dict[str, Any] = {"prompt": "x", "model": "base"} if path == "/v1/completions" else {"id": "h"}
    reply = await served.http.request(
        "PUT" if path.endswith("/a") else "POST",
        path,
        content=json.dumps(rest | fields),
        headers={**ADMIN, "Content-Type": "application/json"},
    )
    assert reply.status_code < 500, reply.text
    await admin(served, "DELETE", "/compositions/h")


# --- named ---


async def test_named_compositions(served: Served) -> None:
    made = await create(served, description="both")
    assert made["adapters"] == AB and made["combination"] == "lorahub" and made["state"] == "ready"
    assert (made["object"], made["description"], made["provenance"]) == ("composition", "both", None)
    listed = await admin(served, "GET", "/compositions")
    assert listed.json()["data"] == [made]
    shown = await admin(served, "GET", "/compositions/ab")
    assert shown.json() == made and shown.headers["etag"] == f'"{made["revision"]}"'

    served.client.requests.clear()
    reply = await served.complete(model="ab")
    assert reply["model"] == "ab" and reply["usage"]["weft"] == {"compose_ms": 2.5}
    request = served.client.requests[-1]
    assert request.composition == Composition((Member("v1", 0.5), Member("v2", -1.0)), "lorahub")
    assert request.adapter_name == "ab" and served.client.holding[request.request_id] == ("a", "b")

    models = (await served.http.get("/v1/models")).json()["data"]
    card = next(model for model in models if model["id"] == "ab")
    assert (card["parent"], card["root"], card["adapters"]) == ("base", "base", AB)
    assert (await served.http.get("/v1/models/ab")).json() == card
    assert (await served.post("/tokenize", {"model": "ab", "prompt": "x"})).status_code == 200

    assert (await admin(served, "DELETE", "/compositions/ab")).json()["deleted"] is True
    assert (await admin(served, "DELETE", "/compositions/ab")).status_code == 404
    error = await served.error("/v1/completions", {"model": "ab", "prompt": "x"}, 404)
    assert error["code"] == "model_not_found"


async def test_compositions_and_adapters_share_their_ids(served: Served) -> None:
    await create(served)
    for id, code in (("ab", "composition_exists"), ("a", "adapter_exists")):
        reply = await admin(served, "POST", "/compositions", {"id": id, "adapters": AB})
        assert reply.status_code == 409 and reply.json()["error"]["code"] == code
    reply = await admin(served, "POST", "/adapters", {"id": "ab", "source": "/x"})
    assert reply.status_code == 409 and reply.json()["error"]["code"] == "composition_exists"
    for id in ("base", "alias/of-base", COMPOSED, "a,b", ".."):
        assert (await admin(served, "POST", "/compositions", {"id": id, "adapters": AB})).status_code == 400


async def test_bad_compositions_are_not_kept(served: Served) -> None:
    await create(served)
    bad: list[tuple[dict[str, Any], int, str]] = [
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": [{"id": "nope", "weight": 1}]}, 404, "adapters[0].id"),
        ({"adapters": [{"id": "ab", "weight": 1}]}, 400, "adapters[0].id"),
        ({"adapters": [{"id": "new", "weight": 1}]}, 404, "adapters[0].id"),
        ({"adapters": AB, "combination": "svd"}, 400, "combination"),
        ({"adapters": AB, "weights": 1}, 400, "weights"),
    ]
    for fields, status, param in bad:
        reply = await admin(served, "POST", "/compositions", {"id": "new", **fields})
        assert reply.status_code == status and reply.json()["error"]["param"] == param, reply.text
    served.client.fail = InvalidRequest("adapters[1] cannot be composed: it is no LoRA", param="adapters[1]")
    for method, path in (("POST", "/compositions"), ("PUT", "/compositions/ab")):
        body = {"adapters": AB} | ({"id": "new"} if method == "POST" else {})
        reply = await admin(served, method, path, body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "adapters[1]"
    assert [one.id for one in served.state.compositions.list()] == ["ab"]


async def test_replace_needs_the_revision_it_is_given(served: Served) -> None:
    made = await create(served)
    body = {"adapters": [{"id": "b", "weight": 2}], "combination": "linear"}
    reply = await admin(served, "PUT", "/compositions/ab", body, **{"If-Match": '"other"'})
    assert reply.status_code == 412
    reply = await admin(served, "PUT", "/compositions/ab", body, **{"If-Match": f'"{made["revision"]}"'})
    assert reply.status_code == 200 and reply.json()["revision"] != made["revision"]
    await served.complete(model="ab")
    assert served.client.requests[-1].composition == Composition((Member("v2", 2.0),), "linear")
    assert (await admin(served, "PUT", "/compositions/x", body)).status_code == 404


async def test_a_member_that_is_gone_breaks_it_until_it_is_back(served: Served) -> None:
    await create(served)
    record = served.registry.records["b"]
    for change in ("unloaded", "draining"):
        if change == "unloaded":
            del served.registry.records["b"]
        else:
            served.registry.records["b"] = replace(record, state="draining")
        shown = (await admin(served, "GET", "/compositions/ab")).json()
        assert shown["state"] == "broken" and "'b'" in shown["error"]
        error = await served.error("/v1/completions", {"model": "ab", "prompt": "x"}, 409)
        assert error["code"] == "composition_broken" and "'b'" in error["message"] and error["param"] == "model"
        ids = [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]]
        assert "ab" not in ids
    served.registry.add("b", "v9")
    await served.complete(model="ab")
    assert served.client.requests[-1].composition.versions == ("v1", "v9")


async def test_after_a_members_replacement_new_requests_see_it(served: Served) -> None:
    await create(served)
    served.client.gate = asyncio.Semaphore(0)
    first = asyncio.create_task(served.complete(model="ab"))
    while len(served.client.requests) < 2:
        await asyncio.sleep(0.01)
    await served.registry.replace("b", "/other")
    served.client.gate = None
    await served.complete(model="ab")
    versions = [request.composition.versions for request in served.client.requests[1:]]
    assert versions == [("v1", "v2"), ("v1", "v2+")]
    first.cancel()


# --- of a proxy model's adapters ---


@pytest.fixture
def with_small(served: Served) -> Served:
    """With the proxy model ``small`` and its adapters ``x`` and ``y`` as well."""
    client, registry = served.client, served.registry
    client.info = replace(client.info, proxies={"small": replace(client.info, model="small", max_model_len=99)})
    registry.names.base_names = (*registry.names.base_names, "small")
    for id in ("x", "y"):
        registry.records[id] = replace(registry.add(id, f"version-of-{id}"), base="small")
    return served


XY = [{"id": "x", "weight": 0.5}, {"id": "y", "weight": -1}]
OF_SMALL = Composition((Member("version-of-x", 0.5), Member("version-of-y", -1.0)), "lorahub")


async def test_adapters_of_a_proxy_model_are_composed_for_it(with_small: Served) -> None:
    served = with_small
    made = await create(served, "xy", adapters=XY)
    assert (made["base"], made["state"], made["adapters"]) == ("small", "ready", XY)
    probe = served.client.requests.pop()
    term = Term(1.0, "small", None, COMPOSED, OF_SMALL)
    assert probe.arithmetic == LogitArithmetic((term,), weight=0.0) and probe.composition is None
    assert (await create(served))["base"] is None
    models = {model["id"]: model for model in (await served.http.get("/v1/models")).json()["data"]}
    card = models["xy"]
    assert (card["parent"], card["root"], card["max_model_len"], card["proxy_only"]) == ("small", "small", 99, True)
    assert card["adapters"] == XY and card == (await served.http.get("/v1/models/xy")).json()
    assert "proxy_only" not in models["ab"] and models["ab"]["parent"] == "base"

    named = replace(term, adapter_name="xy")
    side = {"model": "small", "adapter": "xy"}
    for fields in (
        {"proxy": {"expert": side, "anti_expert": {"model": "small"}}},
        {"logit_arithmetic": [{**side, "weight": 1}]},
    ):
        await served.complete(**fields)
        request = served.client.requests[-1]
        assert request.arithmetic.terms[0] == named
        assert set(served.client.holding[request.request_id]) == {"x", "y"}

    errors = [
        await served.error("/v1/completions", {"model": id, "prompt": "x"}, 400) for id in ("x", "xy")
    ]  # the same of both
    messages = {error.pop("message").replace("adapter 'x'", "").replace("composition 'xy'", "") for error in errors}
    assert errors[0] == errors[1] and errors[0]["code"] == "wrong_base" and len(messages) == 1


async def test_a_composition_stays_of_its_model(with_small: Served) -> None:
    served = with_small
    await create(served, "xy", adapters=XY)
    probes = len(served.client.requests)
    for id, adapters, param in (("xy", AB, "adapters[0].id"), ("xy", [XY[0], AB[0]], "adapters[1].id")):
        reply = await admin(served, "PUT", f"/compositions/{id}", {"adapters": adapters})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, param, "wrong_base")
    assert len(served.client.requests) == probes
    reply = await admin(served, "PUT", "/compositions/xy", {"adapters": [{"id": "y", "weight": 2}]})
    assert reply.json()["base"] == "small" and len(served.client.requests) == probes + 1
    side = {"model": "small", "adapter": "xy"}
    body = {"model": "base", "prompt": "x", "proxy": {"expert": side, "anti_expert": {"model": "small"}}}
    # A member that comes back as another model's breaks it, as one that is gone does.
    for record, reason in ((None, "is not served"), (served.registry.records["a"], "belongs to the model 'base' now")):
        served.registry.records.pop("y")
        if record is not None:
            served.registry.records["y"] = replace(record, id="y")
        error = await served.error("/v1/completions", body, 409)
        assert error["code"] == "composition_broken" and error["param"] == "proxy.expert.adapter"
        assert reason in error["message"]
        assert reason in (await admin(served, "GET", "/compositions/xy")).json()["error"]
        served.registry.records["y"] = replace(served.registry.records["x"], id="y")
    assert (await served.post("/v1/completions", body)).status_code == 200


async def test_what_a_server_without_its_model_says_of_it(with_small: Served) -> None:
    served = with_small
    await create(served, "xy", adapters=XY)
    served.client.info = replace(served.client.info, proxies={})
    for id in ("x", "y"):
        served.registry.records[id] = replace(served.registry.records[id], state="failed", error="no such model")
    ids = [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]]
    assert not {"x", "y", "xy"} & {*ids}
    for id in ("x", "xy"):
        reply = await served.http.get(f"/v1/models/{id}")
        assert reply.status_code == 404 and "'small'" in reply.json()["error"]["message"]
    assert (await admin(served, "GET", "/compositions/xy")).json()["state"] == "broken"
    assert (await admin(served, "DELETE", "/compositions/xy")).status_code == 200


async def test_the_engines_refusal_of_a_proxy_models_members(with_small: Served) -> None:
    served = with_small
    field = "logit_arithmetic[0].adapters[1]"
    served.client.fail = InvalidRequest("logit_arithmetic[0]: adapters[1] cannot be composed: no LoRA", param=field)
    reply = await admin(served, "POST", "/compositions", {"id": "xy", "adapters": XY})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "adapters[1]")
    assert error["message"] == "adapters[1] cannot be composed: no LoRA"


async def test_they_survive_a_restart(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = Compositions(folder, served.registry)  # type: ignore[arg-type]
    members, found = (WeighedId("a", 1.0),), {"seed": 42}
    made = await first.keep(NamedComposition("kept", members, "linear", 5, "é", found, base="small"))
    served.registry.names._holders.remove(first)
    again = Compositions(folder, served.registry)  # type: ignore[arg-type]
    assert again.list() == [made] and again.state(made).error == "its member 'a' belongs to the model 'base' now"
    assert json.loads((folder / named.FILE).read_text())["compositions"][0]["id"] == "kept"
    (folder / named.FILE).write_text('{"schema": 1, "compositions": [{"id": "x"}]}')
    with pytest.raises(ConfigError, match=named.FILE):
        Compositions(folder, served.registry)  # type: ignore[arg-type]


async def test_what_cannot_be_written_is_not_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weft.server.registry.manifest._replace", full)
        with pytest.raises(OSError, match="No space"):
            await served.state.compositions.create("ab", [WeighedId("a", 1.0)], "linear")
    assert served.state.compositions.list() == [] and not served.registry.names.known("ab")
    await create(served)


async def test_metrics_know_compositions(served: Served) -> None:
    await create(served)
    await served.complete(model="ab")
    await served.complete(adapters=AB)
    text = (await served.http.get("/metrics")).text
    assert 'weft_requests_total{adapter="ab",finish_reason="stop"} 1.0' in text
    assert f'weft_requests_total{{adapter="{COMPOSED}",finish_reason="stop"}} 1.0' in text
    assert 'weft_request_compose_seconds_count{adapter="ab"} 1.0' in text
    assert 'weft_requests_running{adapter="ab"}' in text and "weft_composition_seconds_count" in text
    await admin(served, "DELETE", "/compositions/ab")
    assert 'adapter="ab"' not in (await served.http.get("/metrics")).text


# --- the search for weights ---


def bowl(request: Any) -> float:
    """The least loss is at a = 0.8, b = -0.6."""
    if request.composition is None:
        return 1.0
    weights = {member.version: member.weight for member in request.composition.members}
    return float((weights["v1"] - 0.8) ** 2 + (weights["v2"] + 0.6) ** 2)


async def ended(served: Served, job: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            card = (await admin(served, "GET", f"/jobs/{job['id']}")).json()
            if card["state"] != "running":
                return dict(card)
            await asyncio.sleep(0.02)


async def fit(served: Served, **fields: Any) -> Any:
    reply = await admin(served, "POST", "/compositions/fit", {**FIT, **fields})
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/admin/jobs/{reply.json()['id']}"
    return reply.json()


async def test_fit_finds_weights_and_names_them(served: Served) -> None:
    served.client.loss = bowl
    job = await fit(served)
    assert job["state"] == "running" and job["request"]["budget"] == 40
    reply = await admin(served, "POST", "/compositions", {"id": "mix", "adapters": AB})
    assert reply.status_code == 409, "the id is kept for what is being made"

    told = events(await admin(served, "GET", f"/jobs/{job['id']}/events"), comments=True)
    assert told[-1] == DONE.decode().removeprefix("data: ").strip()
    trials, end = told[:-2], told[-2]
    assert len(trials) == 40 and {trial["type"] for trial in trials} == {"trial"} and end["type"] == "end"
    assert trials[0]["adapters"] == [{"id": "a", "weight": 0.0}, {"id": "b", "weight": 0.0}]
    assert trials[0]["loss"] == pytest.approx(1.0) and trials[0]["score"] == pytest.approx(1.0)
    card = end["job"]
    assert card["state"] == "succeeded" and card["losses"] == [trial["loss"] for trial in trials]
    assert card == (await admin(served, "GET", f"/jobs/{job['id']}")).json()
    found = {member["id"]: member["weight"] for member in card["result"]["adapters"]}
    assert found["a"] == pytest.approx(0.8, abs=0.1) and found["b"] == pytest.approx(-0.6, abs=0.1)

    made = (await admin(served, "GET", "/compositions/mix")).json()
    assert made["adapters"] == card["result"]["adapters"] and made["combination"] == "lorahub"
    provenance = made["provenance"]
    assert provenance["candidates"] == [{"id": "a", "version": "v1"}, {"id": "b", "version": "v2"}]
    assert (provenance["optimizer"], provenance["budget"], provenance["seed"]) == ("NGOpt", 40, 42)
    assert provenance["examples"]["count"] == 2 and len(provenance["losses"]) == 40
    await served.complete(model="mix")
    assert served.registry.leases == []


async def test_what_the_engine_is_asked_to_score(served: Served) -> None:
    served.client.loss = bowl
    await ended(served, await fit(served, budget=1, combination="linear", optimizer="Shiwa"))
    first = [request for request in served.client.requests if request.params.prompt_logprobs == 0][:2]
    tokenizer, end = served.tokenizer, served.client.info.eos_token_ids[0]
    assert sorted(request.prompt_token_ids for request in first) == sorted(
        [*tokenizer.encode(e["prompt"], add_special_tokens=True),
         *tokenizer.encode(e["completion"], add_special_tokens=False), end]
        for e in EXAMPLES
    )  # fmt: skip
    for request in first:
        assert request.priority > 0 and request.composition.combination == "linear"
        assert served.client.holding[request.request_id] == ("a", "b")


async def test_a_round_is_scored_together(served: Served) -> None:
    served.client.loss = bowl
    served.client.gate = asyncio.Semaphore(1)  # for the probe
    job = await fit(served, optimizer="Shiwa", round_size=4, budget=8)
    async with asyncio.timeout(30):
        while len(served.client.requests) < 9:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    together = served.client.requests[1:]
    assert len(together) == 8 and len({request.composition for request in together}) == 4
    served.client.gate = None
    await admin(served, "DELETE", f"/jobs/{job['id']}")


async def test_a_job_is_cancelled(served: Served) -> None:
    served.client.gate = asyncio.Semaphore(1)
    job = await fit(served)
    async with asyncio.timeout(30):
        while len(served.client.requests) < 2:
            await asyncio.sleep(0.01)
    card = (await admin(served, "DELETE", f"/jobs/{job['id']}")).json()
    assert card["state"] == "cancelled" and card["ended"] is not None
    assert served.registry.leases == [] and not served.registry.names.known("mix")
    assert (await admin(served, "DELETE", f"/jobs/{job['id']}")).json() == card
    assert set(served.client.aborted) >= {request.request_id for request in served.client.requests[1:]}


async def test_a_candidate_that_is_unloaded_ends_the_job(served: Served) -> None:
    def unload(request: Any) -> float:
        served.registry.records["b"] = replace(served.registry.records["b"], state="draining")
        return 1.0

    served.client.loss = unload
    card = await ended(served, await fit(served))
    assert card["state"] == "failed" and "'b' was unloaded" in card["error"]
    assert served.registry.leases == [] and not served.registry.names.known("mix")


@pytest.mark.parametrize("error", [EngineUnavailable("the engine died"), RuntimeError("a bug")])
async def test_an_engine_that_fails_ends_the_job(served: Served, error: Exception) -> None:
    def fail(request: Any) -> float:
        raise error

    served.client.loss = fail
    card = await ended(served, await fit(served))
    assert card["state"] == "failed" and ("died" in card["error"] or "internal" in card["error"])


async def test_a_full_queue_is_waited_for(served: Served) -> None:
    refusals = [Overloaded("full", retry_after=0)] * 3

    def loss(request: Any) -> float:
        if refusals:
            raise refusals.pop()
        return bowl(request)

    served.client.loss = loss
    card = await ended(served, await fit(served, budget=3))
    assert card["state"] == "succeeded" and not refusals


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"candidates": []}, 400, "candidates"),
        ({"candidates": ["a"] * 2}, 400, "candidates[1]"),
        ({"candidates": ["a", "nope"]}, 404, "candidates[1]"),
        ({"candidates": [f"c{i}" for i in range(65)]}, 400, "candidates"),
        ({"examples": []}, 400, "examples"),
        ({"examples": [{"prompt": "x"}]}, 400, "examples[0].completion"),
        ({"examples": [{"prompt": "", "completion": "x"}]}, 400, "examples[0].prompt"),
        ({"examples": [{"prompt": "x " * 300, "completion": "x"}]}, 400, "examples[0]"),
        ({"examples": [EXAMPLES[0]] * 257}, 400, "examples"),
        ({"budget": 0}, 400, "budget"),
        ({"budget": 1001}, 400, "budget"),
        ({"budget": True}, 400, "budget"),
        ({"seed": -1}, 400, "seed"),
        ({"optimizer": "Adam"}, 400, "optimizer"),
        ({"round_size": 0}, 400, "round_size"),
        ({"l1": float("nan")}, 400, ""),
        ({"l1": -1}, 400, "l1"),
        ({"save_as": "a"}, 409, "id"),
        ({"save_as": "a/b"}, 400, "id"),
        ({"combination": "svd"}, 400, "combination"),
    ],
)
async def test_bad_searches_are_refused_at_once(served: Served, fields: dict, status: int, param: str) -> None:
    reply = await admin(served, "POST", "/compositions/fit", {**FIT, **fields})
    assert reply.status_code == status, reply.text
    assert (reply.json()["error"]["param"] or "").startswith(param)
    assert served.state.jobs.list() == [] and served.registry.leases == []


async def test_candidates_that_do_not_compose_are_refused_at_once(served: Served) -> None:
    served.client.fail = InvalidRequest("adapters[1] cannot be composed: it is no LoRA", param="adapters[1]")
    reply = await admin(served, "POST", "/compositions/fit", FIT)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "candidates[1]" and "candidates[1]" in error["message"]


async def test_without_nevergrad(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.server.http.compositions.find_spec", lambda name: None)
    reply = await admin(served, "POST", "/compositions/fit", FIT)
    assert reply.status_code == 409 and "weft[fit]" in reply.json()["error"]["message"]


async def test_jobs_are_bounded(serve: Serve) -> None:
    served = serve()
    served.registry.add("b", "v2")
    served.client.loss = bowl
    gate = served.client.gate = asyncio.Semaphore(5)  # a probe each
    for number in range(4):
        await fit(served, save_as=f"mix-{number}")
        gate = served.client.gate = asyncio.Semaphore(1)
    reply = await admin(served, "POST", "/compositions/fit", {**FIT, "save_as": "more"})
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0 and gate is served.client.gate
    listed = (await admin(served, "GET", "/jobs")).json()["data"]
    assert len(listed) == 4 and not served.registry.names.known("more")
    await served.state.jobs.close()
    assert {job.state for job in served.state.jobs.list()} == {"cancelled"} and served.registry.leases == []
    assert (await admin(served, "GET", "/jobs/nope")).status_code == 404
