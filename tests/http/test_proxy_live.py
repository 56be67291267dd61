"""Proxy-tuning through the whole server, against a loop over three models by transformers and peft."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from peft import LNTuningConfig

from tests.http.conftest import ADMIN, ADMIN_KEY
from tests.http.fakes import byte_level_tokenizer
from tests.support.adapters import PeftReference, make_adapter, make_lora
from tests.support.models import tiny_model
from weft.server.config import EngineConfig
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
from weft.server.http.render import LOWEST
from weft.server.http.state import ServerState
from weft.server.observability.logs import LogConfig
from weft.server.observability.metrics import Metrics
from weft.server.registry.compositions import Compositions
from weft.server.registry.proxies import Proxies
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient
from weft.server.tokenization import Tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one engine for all

TOLERANCE = 1e-3
TOKENS = 10
ROWS = 8
PROMPT = "the quick brown"
LONG = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 3
PADDING = 24
"""Logits of the small model beyond the vocabulary."""
PROXY = {"expert": {"model": "small", "adapter": "x"}, "anti_expert": {"model": "small"}}
XY = {"adapters": [{"id": "x", "weight": 0.5}, {"id": "y", "weight": -1}], "combination": "linear"}
MANY = 160
"""Tokens of requests that are still under way when something else has happened."""


@dataclass
class Whole:
    """A server with the adapters ``a`` and ``b``, and the proxy model ``small`` with ``x`` and ``y``."""

    http: httpx.AsyncClient
    client: EngineClient
    registry: AdapterRegistry
    tokenizer: Tokenizer
    folders: dict[str, Path]
    references: dict[str, PeftReference]

    async def choice(self, **body: Any) -> Any:
        asked = {"model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        asked |= {"logprobs": 0, "return_token_ids": True}
        reply = await self.http.post("/v1/completions", json=asked | body)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]

    async def scored(self, **body: Any) -> Any:
        """The ``logprobs`` of the prompt, echoed, as lm-eval asks for them: ids in, one token out."""
        prompt = self.tokenizer.encode(LONG)
        asked = {"model": "base", "prompt": [prompt], "temperature": 0, "max_tokens": 1, "seed": 1234}
        reply = await self.http.post("/v1/completions", json={**asked, "logprobs": 1, "echo": True, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["logprobs"]

    def assert_scored(self, given: Any, weights: dict[str, float], top_p: float | None = None) -> None:
        """Each token's log-probability, and whether it is the most likely one, is that of the models run alone."""
        ids, width = self.tokenizer.encode(LONG), len(self.tokenizer.backend)
        assert {len(values) for values in given.values()} == {len(ids) + 1}
        scores = torch.stack([w * self.references[n].logits(ids)[:, :width] for n, w in weights.items()]).sum(0)
        if top_p is not None:
            probs, order = self.references["base"].logits(ids)[:, :width].softmax(-1).sort(descending=True)
            outside = torch.zeros_like(scores).bool().scatter(1, order, probs.cumsum(-1) - probs > top_p)
            scores = scores.masked_fill(outside, -torch.inf)
        expected = scores.log_softmax(-1)
        for position, token in enumerate(ids[1:], 1):
            row, said = expected[position - 1], given["token_logprobs"][position]
            assert abs(said - max(float(row[token]), LOWEST)) < TOLERANCE
            assert (said == max(given["top_logprobs"][position].values())) == (token == int(row.argmax()))
        assert given["token_logprobs"][0] is None

    def expected(self, weights: dict[str, float], prompts: dict[str, list[int]] | None = None) -> tuple[Any, Any]:
        """Greedy tokens of the weighed sum, and their log-probabilities, each model run alone without a cache."""
        prompt, width = self.tokenizer.encode(PROMPT), len(self.tokenizer.backend)
        tokens: list[int] = []
        logprobs = []
        for _ in range(TOKENS):
            scores = sum(
                weight * self.references[name].logits([*(prompts or {}).get(name, prompt), *tokens])[-1][:width]
                for name, weight in weights.items()
            )
            assert isinstance(scores, torch.Tensor)
            logprobs.append(float(scores.log_softmax(-1).max()))
            tokens.append(int(scores.argmax()))
        return tokens, torch.tensor(logprobs)

    def assert_same(self, choice: Any, expected: tuple[Any, Any]) -> None:
        assert choice["token_ids"] == expected[0]
        given = torch.tensor(choice["logprobs"]["token_logprobs"])
        assert (given - expected[1]).abs().max() < TOLERANCE

    async def admin(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        reply = await self.http.request(method, f"/admin/{path}", json=body, headers=ADMIN)
        assert reply.status_code == status, reply.text
        return reply.json()

    async def long(self, request: dict[str, Any]) -> list[int]:
        """The tokens of a long request."""
        tokens: list[int] = (await self.choice(**request, max_tokens=MANY))["token_ids"]
        return tokens

    async def start(self, requests: list[dict[str, Any]]) -> list[asyncio.Task[list[int]]]:
        """Long requests, once all of them run."""
        tasks = [asyncio.create_task(self.long(request)) for request in requests]
        async with asyncio.timeout(30):
            while (await self.client.refresh_stats()).running < len(tasks):
                await asyncio.sleep(0.005)
        return tasks


def summed(base: Path, x: Path, y: Path) -> PeftReference:
    """``XY`` as peft sums it."""
    reference = PeftReference(base, x)
    reference.model.load_adapter(str(y), "y")
    reference.model.add_weighted_adapter(["default", "y"], [0.5, -1.0], "xy", combination_type="cat")
    reference.model.set_adapter("xy")
    return reference


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    root = tmp_path_factory.mktemp("served")
    tokenizer = byte_level_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    base = tiny_model("llama", root / "base", vocab_size=len(tokenizer), **special)
    small = tiny_model("gpt2", root / "small", seed=3, vocab_size=len(tokenizer) + PADDING, **special)
    for folder in (base, small):
        tokenizer.save_pretrained(folder)
    folders = {
        **{id: make_lora(base, root / id, seed=seed, r=4, target_modules=["q_proj", "down_proj"])
           for id, seed in (("a", 1), ("b", 4))},
        **{id: make_lora(small, root / id, seed=seed, r=8, target_modules=["c_attn", "c_proj"])
           for id, seed in (("x", 2), ("y", 5))},
        "norms": make_adapter(small, root / "norms", LNTuningConfig(task_type="CAUSAL_LM")),
    }  # fmt: skip
    references = {"base": PeftReference(base), "small": PeftReference(small)}
    references |= {id: PeftReference(base if id == "a" else small, folders[id]) for id in ("a", "x", "y")}
    references["xy"] = summed(small, folders["x"], folders["y"])
    config = EngineConfig(
        str(base),
        device="cpu",
        dtype="float32",
        max_num_seqs=ROWS,
        max_num_batched_tokens=128,
        block_size=8,
        proxy_models=(("small", str(small)),),
    )
    client = EngineClient(config, logging=LogConfig("warning"))
    await client.start()
    try:
        state_dir = tmp_path_factory.mktemp("state")
        registry = AdapterRegistry(client, state_dir, roots=[root], base_name="base", proxy_models=("small",))
        for id, folder in folders.items():
            await registry.load(id, str(folder), base=None if id in "ab" else "small")
        loaded = Tokenizer.load(str(base), max_model_len=client.info.max_model_len)
        assert loaded is not None
        state = ServerState(
            client,
            registry,
            loaded,
            Metrics(client, registry),
            Keyring(ADMIN_KEY),
            ("base",),
            Compositions(state_dir, registry),
            Proxies(state_dir, registry),
            {"small": loaded},
        )
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://weft", timeout=60) as http:
            yield Whole(http, client, registry, loaded, folders, references)
        state.workers.close()
    finally:
        await client.stop()


async def test_steered_requests_equal_three_models_run_one_after_the_other(whole: Whole) -> None:
    async def check(alpha: float) -> list[int]:
        choice = await whole.choice(proxy={**PROXY, "alpha": alpha})
        whole.assert_same(choice, whole.expected({"base": 1.0, "x": alpha, "small": -alpha}))
        tokens: list[int] = choice["token_ids"]
        return tokens

    answers = await asyncio.gather(*map(check, (0.0, 0.5, 1.0, 2.0)))
    assert answers[0] == (await whole.choice())["token_ids"]
    assert len({tuple(answer) for answer in answers}) > 1, "the proxy steers"


async def test_an_adapter_is_steered_beside_requests_that_are_not(whole: Whole) -> None:
    steered, plain, own = await asyncio.gather(
        whole.choice(model="a", proxy=PROXY),
        whole.choice(model="a"),
        whole.choice(proxy={"expert": {"adapter": "a"}, "anti_expert": {"model": "base"}, "alpha": 2}),
    )
    whole.assert_same(steered, whole.expected({"a": 1.0, "x": 1.0, "small": -1.0}))
    whole.assert_same(plain, whole.expected({"a": 1.0}))
    whole.assert_same(own, whole.expected({"base": -1.0, "a": 2.0}))


async def in_one_batch(whole: Whole, alphas: Sequence[float | None]) -> list[Any]:
    """Requests with those weights (None: not steered) that begin in one step and so stay together."""

    async def ask(alpha: float | None) -> Any:
        proxy = {} if alpha is None else {"proxy": {**PROXY, "alpha": alpha, "base_top_p": None}}
        return await whole.choice(**proxy, logprobs=3, prompt_logprobs=3)

    terms = [{"weight": 1}, *({"weight": 0.1, "prompt": [5]} for _ in range(ROWS - 1))]
    blocker = asyncio.create_task(whole.choice(logit_arithmetic=terms, max_tokens=400))  # it takes all rows
    async with asyncio.timeout(60):
        while (await whole.client.refresh_stats()).running != 1:
            await asyncio.sleep(0.01)
        asked = [asyncio.create_task(ask(alphas[0]))]
        for alpha in (*alphas[1:], None):  # one after the other, so that they are served in this order
            while (await whole.client.refresh_stats()).waiting != len(asked):
                await asyncio.sleep(0.01)
            if len(asked) < len(alphas):
                asked.append(asyncio.create_task(ask(alpha)))
    assert not blocker.done()
    blocker.cancel()
    return [await each for each in asked]


async def test_weights_of_zero_are_the_base_bit_for_bit_in_a_mixed_batch(whole: Whole) -> None:
    """Equal floats, not close ones, of the output and of the prompt, beside requests that are steered.

    A product's last bits may depend on where in its batch a row is, so what is compared is at one place of equal
    batches: requests of weight 0 and requests that are not steered change places.
    """
    first = await in_one_batch(whole, (0.0, None, 0.5, 1.0, 2.0, 0.0, None))
    second = await in_one_batch(whole, (None, 0.0, 0.5, 1.0, 2.0, None, 0.0))
    assert first == second
    for steered in first[2:5]:
        assert steered["prompt_logprobs"] != first[1]["prompt_logprobs"]
        assert steered["logprobs"]["token_logprobs"] != first[1]["logprobs"]["token_logprobs"]


async def test_the_evaluation_harness_scores_what_is_steered(whole: Whole) -> None:
    """Prompts of several steps, of all kinds in the same batches, the streams of a request in step."""

    def proxy(alpha: float, top_p: float | None = None) -> dict[str, Any]:
        return {"proxy": {**PROXY, "alpha": alpha, "base_top_p": top_p}}

    sums: list[tuple[dict[str, Any], dict[str, float], float | None]] = [
        (proxy(alpha, top_p), {"base": 1.0, "x": alpha, "small": -alpha}, top_p)
        for alpha in (0.0, 0.5, 1.0, 2.0)
        for top_p in (None, 0.9)
    ]
    sums.append((proxy(1.0) | {"model": "a"}, {"a": 1.0, "x": 1.0, "small": -1.0}, None))
    terms = [{"weight": 0.5}, {"adapters": [{"id": "a", "weight": 1}], "weight": 0.7}, {"model": "small", "weight": 1}]
    sums.append(({"logit_arithmetic": terms}, {"base": 0.5, "a": 0.7, "small": 1.0}, None))
    sums.append(({"model": "a"}, {"a": 1.0}, None))
    plain = asyncio.gather(*(whole.choice(proxy=PROXY) for _ in range(3)))
    given = await asyncio.gather(*(whole.scored(**fields) for fields, _, _ in sums))
    for answer, (_, weights, top_p) in zip(given, sums, strict=True):
        whole.assert_scored(answer, weights, top_p)
    for choice in await plain:
        whole.assert_same(choice, whole.expected({"base": 1.0, "x": 1.0, "small": -1.0}))
    short = await whole.scored(**proxy(1.0), max_tokens=0)
    assert short["token_logprobs"] == pytest.approx(given[4]["token_logprobs"][:-1], abs=TOLERANCE)


async def test_terms_on_other_prompts_have_no_scores_of_the_prompt(whole: Whole) -> None:
    terms = [{"weight": 2}, {"weight": -0.5, "prompt": "a dog"}]
    for fields, param in (
        ({"prompt_logprobs": 0}, "logit_arithmetic[1]"),
        ({"echo": True, "logprobs": 1}, "logit_arithmetic[1]"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logit_arithmetic[1]"),
    ):
        body = {"model": "base", "prompt": PROMPT, "logit_arithmetic": terms, **fields}
        reply = await whole.http.post("/v1/completions", json=body)
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["param"] == param, reply.text
        assert param in error["message"] and "of other tokens" in error["message"] and "echo" in error["message"]
    terms[1]["prompt"] = PROMPT  # the same tokens
    choice = await whole.choice(logit_arithmetic=terms, prompt_logprobs=0)
    assert len(choice["prompt_logprobs"]) == len(whole.tokenizer.encode(PROMPT))


async def test_a_term_on_another_prompt(whole: Whole) -> None:
    whole.references["again"] = whole.references["base"]
    choice = await whole.choice(logit_arithmetic=[{"weight": 2}, {"weight": -0.5, "prompt": "a dog"}])
    prompts = {"again": whole.tokenizer.encode("a dog")}
    whole.assert_same(choice, whole.expected({"base": 2.0, "again": -0.5}, prompts))


async def test_a_named_proxy(whole: Whole) -> None:
    body = {"id": "p", **PROXY, "alpha": 0.5, "base": "a"}
    reply = await whole.http.post("/admin/proxies", json=body, headers=ADMIN)
    assert reply.status_code == 201, reply.text
    whole.assert_same(await whole.choice(model="p"), whole.expected({"a": 1.0, "x": 0.5, "small": -0.5}))
    card = (await whole.http.get("/admin/adapters/x", headers=ADMIN)).json()
    assert card["base"] == "small" and card["tier"] == "device" and card["refcount"] == 0
    text = (await whole.http.get("/metrics")).text
    assert 'weft_requests_total{adapter="p",finish_reason="length"} 1.0' in text
    assert 'weft_proxy_kv_cache_blocks{model="small"}' in text
    await whole.registry.unload("x")
    refused = await whole.http.post("/v1/completions", json={"model": "p", "prompt": PROMPT})
    assert refused.status_code == 409 and "'x'" in refused.json()["error"]["message"]
    await whole.registry.load("x", str(whole.folders["x"]), base="small")
    whole.assert_same(await whole.choice(model="p"), whole.expected({"a": 1.0, "x": 0.5, "small": -0.5}))


async def test_a_named_composition_of_the_proxy_models_adapters(whole: Whole) -> None:
    made = await whole.admin("POST", "compositions", {"id": "xy", **XY}, 201)
    assert made["base"] == "small"
    expected = whole.expected({"base": 1.0, "xy": 2.0, "small": -2.0})
    for expert in ({"model": "small", "adapter": "xy"}, {"model": "small", **XY}):
        steered = await whole.choice(proxy={"expert": expert, "anti_expert": {"model": "small"}, "alpha": 2})
        whole.assert_same(steered, expected)
    body = {"id": "q", "expert": {"model": "small", "adapter": "xy"}, "anti_expert": {"model": "small"}, "alpha": 2}
    await whole.admin("POST", "proxies", body, 201)
    whole.assert_same(await whole.choice(model="q"), expected)
    await whole.admin("PUT", "proxies/q", {**PROXY, "alpha": -1})
    whole.assert_same(await whole.choice(model="q"), whole.expected({"base": 1.0, "x": -1.0, "small": 1.0}))
    await whole.admin("PUT", "compositions/xy", {"adapters": [{"id": "y", "weight": 1}], "combination": "linear"})
    steered = await whole.choice(logit_arithmetic=[{"model": "small", "adapter": "xy", "weight": 0.5}])
    whole.assert_same(steered, whole.expected({"base": 1.0, "y": 0.5}))
    for path in ("proxies/q", "compositions/xy"):
        await whole.admin("DELETE", path)


async def test_members_that_do_not_compose_are_named_where_they_stand(whole: Whole) -> None:
    members = [{"id": "x", "weight": 1}, {"id": "norms", "weight": 1}]
    error = (await whole.admin("POST", "compositions", {"id": "bad", "adapters": members}, 400))["error"]
    assert error["param"] == "adapters[1]" and error["message"].startswith("adapters[1] cannot be composed")
    side = {"model": "small", "adapters": members}
    for fields, param in (
        ({"proxy": {"expert": side, "anti_expert": {"model": "small"}}}, "proxy.expert.adapters[1]"),
        ({"logit_arithmetic": [{"weight": 1}, {**side, "weight": 1}]}, "logit_arithmetic[1].adapters[1]"),
    ):
        reply = await whole.http.post("/v1/completions", json={"model": "base", "prompt": PROMPT, **fields})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param), error
        assert "adapters[1] cannot be composed" in error["message"]
    fit = {"candidates": ["x", "y"], "examples": [{"prompt": "a", "completion": "b"}], "save_as": "no"}
    assert (await whole.admin("POST", "compositions/fit", fit, 400))["error"]["param"] == "candidates"


async def test_members_are_replaced_while_requests_run_with_them(whole: Whole) -> None:
    requests = [
        {"proxy": PROXY},
        {"logit_arithmetic": [{"model": "small", "weight": 1, **XY}]},
        {"adapters": [{"id": "a", "weight": 0.5}, {"id": "b", "weight": 0.5}], "combination": "linear"},
        {"proxy": {"expert": {"adapter": "a"}, "anti_expert": {"adapter": "b"}, "alpha": 0.5}},
    ]
    before = await asyncio.gather(*map(whole.long, requests))
    under_way = await whole.start(requests)
    await whole.admin("PUT", "adapters/x", {"source": str(whole.folders["y"])})
    await whole.admin("PUT", "adapters/b", {"source": str(whole.folders["a"])})
    assert not any(task.done() for task in under_way), "the test wants longer requests"
    new = await asyncio.gather(*(whole.choice(**request) for request in requests))
    assert await asyncio.gather(*under_way) == before, "those under way finish with the versions they have"
    whole.assert_same(new[0], whole.expected({"base": 1.0, "y": 1.0, "small": -1.0}))
    whole.assert_same(new[2], whole.expected({"a": 1.0}))
    whole.assert_same(new[3], whole.expected({"base": 1.0}))
    half = {"adapters": [{"id": "y", "weight": -0.5}], "combination": "linear"}  # 0.5 y - y
    same = await whole.choice(logit_arithmetic=[{"model": "small", "weight": 1, **half}])
    assert same["token_ids"] == new[1]["token_ids"] != before[1][:TOKENS]
    for id in "xb":
        await whole.admin("PUT", f"adapters/{id}", {"source": str(whole.folders[id])})
    again = [(await whole.choice(**request))["token_ids"] for request in requests]
    assert again == [tokens[:TOKENS] for tokens in before]


async def test_members_are_unloaded_while_requests_run_with_them(whole: Whole) -> None:
    await whole.admin("POST", "compositions", {"id": "xy", **XY}, 201)
    requests = [{"proxy": PROXY}, {"logit_arithmetic": [{"model": "small", "adapter": "xy", "weight": 1}]}]
    before = await asyncio.gather(*map(whole.long, requests))
    under_way = await whole.start(requests)
    unloading = asyncio.create_task(whole.admin("DELETE", "adapters/x"))
    await asyncio.sleep(0)
    while (await whole.admin("GET", "adapters/x"))["state"] != "draining":
        await asyncio.sleep(0.001)
    for fields, status, param in (
        (requests[0], 404, "proxy.expert.adapter"),
        (requests[1], 409, "logit_arithmetic[0].adapter"),
        ({"logit_arithmetic": [{"model": "small", "weight": 1, **XY}]}, 404, "logit_arithmetic[0].adapters[0].id"),
    ):
        reply = await whole.http.post("/v1/completions", json={"model": "base", "prompt": PROMPT, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    assert not unloading.done() and not any(task.done() for task in under_way)
    assert await asyncio.gather(*under_way) == before
    await unloading
    await whole.registry.load("x", str(whole.folders["x"]), base="small")

    under_way = await whole.start(requests)
    await whole.admin("DELETE", "adapters/x?force_after=0.01")
    for task in under_way:
        with pytest.raises(AssertionError, match="adapter_unloaded"):
            await task
    await whole.registry.load("x", str(whole.folders["x"]), base="small")
    again = [(await whole.choice(**request))["token_ids"] for request in requests]
    assert again == [tokens[:TOKENS] for tokens in before]
    await whole.admin("DELETE", "compositions/xy")


async def test_what_the_engine_refuses_names_the_requests_field(whole: Whole) -> None:
    terms = [{"weight": 1}, *({"weight": 0.1, "prompt": [5, 6, i + 10]} for i in range(9))]
    reply = await whole.http.post(
        "/v1/completions", json={"model": "base", "prompt": PROMPT, "logit_arithmetic": terms}
    )
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "logit_arithmetic"
    reply = await whole.http.post(
        "/v1/completions", json={"model": "base", "prompt": PROMPT, "proxy": {**PROXY, "alpha": 1}, "echo": True}
    )
    assert reply.status_code == 200
