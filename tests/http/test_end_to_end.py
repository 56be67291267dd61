"""The whole server: HTTP, registry, engine process, a small random model, and adapters as peft saved them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from peft import PolyConfig

from tests.http.conftest import ADMIN, ADMIN_KEY, events
from tests.http.fakes import byte_level_tokenizer
from tests.support.adapters import PeftReference, make_adapter, make_lora
from tests.support.models import tiny_model
from weft.server.config import EngineConfig
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
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
PROMPTS = {"base": "the quick", "a": "the lazy dog", "b": "jumps over"}


@dataclass
class Whole:
    """A server with the adapters ``a`` and ``b``; ``c`` is on the disk only."""

    http: httpx.AsyncClient
    client: EngineClient
    registry: AdapterRegistry
    tokenizer: Tokenizer
    folders: dict[str, Path]
    references: dict[str, PeftReference]

    async def complete(self, **body: Any) -> Any:
        reply = await self.http.post(
            "/v1/completions", json={"temperature": 0, "max_tokens": 12, "ignore_eos": True, **body}
        )
        assert reply.status_code == 200, reply.text
        return reply.json()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("served")
    tokenizer = byte_level_tokenizer()
    base = tiny_model("llama", root / "base", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    tokenizer.save_pretrained(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    made = {
        name: make_lora(base, root / name, seed=seed, r=rank, lora_alpha=2 * rank, target_modules=targets)
        for name, seed, rank in (("a", 1, 4), ("b", 2, 8), ("c", 3, 2))
    }
    yield {"base": base, **made}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, PeftReference]:
    return {
        name: PeftReference(folders["base"], None if name == "base" else folder) for name, folder in folders.items()
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(
    folders: dict[str, Path], references: dict[str, PeftReference], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Whole]:
    config = EngineConfig(
        str(folders["base"]), device="cpu", dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, block_size=8
    )
    client = EngineClient(config, logging=LogConfig("warning"))
    await client.start()
    try:
        registry = AdapterRegistry(
            client, tmp_path_factory.mktemp("state"), roots=[folders["base"].parent], base_name="base"
        )
        for name in ("a", "b"):
            await registry.load(name, str(folders[name]))
        tokenizer = Tokenizer.load(str(folders["base"]), max_model_len=client.info.max_model_len)
        assert tokenizer is not None
        compositions = Compositions(tmp_path_factory.mktemp("compositions"), registry)
        proxies = Proxies(tmp_path_factory.mktemp("proxies"), registry)
        keys, metrics = Keyring(ADMIN_KEY), Metrics(client, registry)
        state = ServerState(client, registry, tokenizer, metrics, keys, ("base",), compositions, proxies)
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://weft", timeout=60) as http:
            yield Whole(http, client, registry, tokenizer, folders, references)
        state.workers.close()
    finally:
        await client.stop()


async def test_mixed_requests_answer_as_peft_does_alone(whole: Whole) -> None:
    async def check(model: str) -> None:
        prompt = whole.tokenizer.encode(PROMPTS[model])
        expected = whole.references[model].generate(prompt, 12)
        reply = await whole.complete(model=model, prompt=PROMPTS[model], logprobs=1, return_token_ids=True)
        (choice,) = reply["choices"]
        assert choice["token_ids"] == expected.tokens
        assert choice["text"] == whole.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        given = torch.tensor(choice["logprobs"]["token_logprobs"])
        chosen = expected.logprobs[range(12), expected.tokens]
        assert (given - chosen).abs().max() < TOLERANCE

    await asyncio.gather(*(check(model) for model in [*PROMPTS] * 3))
    stats = await whole.client.refresh_stats()
    assert stats.max_step_adapters == 2  # both in one forward pass, with the base


async def test_contract_of_the_evaluation_harness(whole: Whole) -> None:
    # What lm-eval reads of a log-likelihood request, against the logits of peft.
    for model in PROMPTS:
        ids = whole.tokenizer.encode("the quick brown fox jumps over the lazy dog")
        reply = await whole.complete(model=model, prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234)
        logprobs = reply["choices"][0]["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        expected = torch.log_softmax(whole.references[model].logits(ids).float(), -1)
        for position in range(1, len(ids)):
            row = expected[position - 1]
            assert abs(logprobs["token_logprobs"][position] - float(row[ids[position]])) < TOLERANCE
            greedy = logprobs["token_logprobs"][position] == max(logprobs["top_logprobs"][position].values())
            assert greedy == (ids[position] == int(row.argmax()))
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
        short = await whole.complete(model=model, prompt=[ids], max_tokens=0, logprobs=1, echo=True)
        assert short["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]


async def test_streams_and_stop_strings(whole: Whole) -> None:
    plain = (await whole.complete(model="a", prompt="the cat"))["choices"][0]["text"]
    body = {"model": "a", "prompt": "the cat", "temperature": 0, "max_tokens": 12, "ignore_eos": True, "stream": True}
    *chunks, _ = events(await whole.http.post("/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == plain
    stop = plain[4:6]
    choice = (await whole.complete(model="a", prompt="the cat", stop=stop))["choices"][0]
    assert choice["text"] == plain[: plain.index(stop)] and choice["stop_reason"] == stop


async def test_chat_with_an_adapter(whole: Whole) -> None:
    messages = [{"role": "user", "content": "the dog"}]
    body = {"model": "b", "messages": messages, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    body["return_token_ids"] = True
    reply = (await whole.http.post("/v1/chat/completions", json=body)).json()
    prompt = whole.tokenizer.encode("<s><|user|>the dog</s><|assistant|>", add_special_tokens=False)
    assert reply["prompt_token_ids"] == prompt
    assert reply["choices"][0]["token_ids"] == whole.references["b"].generate(prompt, 8).tokens


async def test_seeds(whole: Whole) -> None:
    body = {"model": "a", "prompt": "the cat", "temperature": 1.0, "seed": 5, "n": 3, "return_token_ids": True}
    first, second = [(await whole.complete(**body))["choices"] for _ in range(2)]
    assert first == second and len({tuple(choice["token_ids"]) for choice in first}) == 3


async def test_adapters_come_change_and_go_under_load(whole: Whole) -> None:
    prompt = whole.tokenizer.encode("the cat")
    expected = {name: whole.references[name].generate(prompt, 40).tokens for name in "ac"}

    async def decode(name: str) -> list[int]:
        reply = await whole.complete(model=name, prompt="the cat", max_tokens=40, return_token_ids=True)
        tokens: list[int] = reply["choices"][0]["token_ids"]
        return tokens

    async def change(method: str, path: str, body: Any = None, status: int = 200, if_match: str = "*") -> Any:
        headers = {**ADMIN, "If-Match": if_match}
        reply = await whole.http.request(method, f"/admin/adapters{path}", json=body, headers=headers)
        assert reply.status_code == status, reply.text
        return reply.json()

    source = {"source": str(whole.folders["c"])}
    under_way = [asyncio.create_task(decode("a")) for _ in range(4)]
    card = await change("POST", "", {"id": "new", **source}, 201)
    assert (card["method"], card["rank"], card["state"]) == ("LORA", 2, "ready")
    await change("POST", "", {"id": "new", **source}, 409)
    old = (await change("GET", "/a"))["version"]
    assert await decode("new") == expected["c"]
    replaced = await change("PUT", "/a", source, if_match=f'"{old}"')
    assert replaced["version"] == card["version"] != old
    await change("PUT", "/a", source, 412, if_match=f'"{old}"')
    assert await decode("a") == expected["c"]
    assert all(tokens == expected["a"] for tokens in await asyncio.gather(*under_way))
    await change("DELETE", "/new")
    await change("GET", "/new", status=404)
    reply = await whole.http.post("/v1/completions", json={"model": "new", "prompt": "x"})
    assert reply.status_code == 404
    shutil.copytree(whole.folders["c"], broken := whole.folders["base"].parent / "broken", dirs_exist_ok=True)
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    error = await change("POST", "", {"id": "broken", "source": str(broken)}, 422)
    assert error["error"]["type"] == "adapter_error"
    error = await change("POST", "", {"id": "out", "source": "/etc"}, 422)
    assert "root" in error["error"]["message"]
    assert {card["id"] for card in (await change("GET", ""))["data"]} == {"a", "b"}
    await change("PUT", "/a", {"source": str(whole.folders["a"])})
    assert await decode("a") == expected["a"]


async def test_a_task_of_every_request(whole: Whole) -> None:
    config = PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=3, n_skills=2, target_modules=["q_proj", "down_proj"])
    folder = make_adapter(whole.folders["base"], whole.folders["base"].parent / "tasks", config, scale=1.0)
    load = {"id": "tasks", "source": str(folder)}
    reply = await whole.http.post("/admin/adapters", json={**load, "pinned": True}, headers=ADMIN)
    assert reply.status_code == 422 and reply.json()["error"]["param"] == "pinned"
    reply = await whole.http.post("/admin/adapters", json=load, headers=ADMIN)
    assert reply.status_code == 201 and reply.json()["choices"]["task_id"]["max"] == 2
    messages = [{"role": "user", "content": "the dog"}]
    chat = whole.tokenizer.encode("<s><|user|>the dog</s><|assistant|>", add_special_tokens=False)
    answers = []
    for task in range(3):
        alone = PeftReference(whole.folders["base"], folder, task)
        body = {"model": "tasks", "task_id": task, "return_token_ids": True, "max_tokens": 8}
        reply = await whole.complete(**body, prompt="the cat")
        answers.append(reply["choices"][0]["token_ids"])
        assert answers[-1] == alone.generate(whole.tokenizer.encode("the cat"), 8).tokens
        body |= {"messages": messages, "temperature": 0, "ignore_eos": True}
        reply = (await whole.http.post("/v1/chat/completions", json=body)).json()
        assert reply["choices"][0]["token_ids"] == alone.generate(chat, 8).tokens
    assert len({tuple(tokens) for tokens in answers}) > 1
    assert (await whole.http.get("/admin/adapters/tasks", headers=ADMIN)).json()["tier"] == "device"
    for fields in ({}, {"task_id": 3}, {"task_id": 0, "lora_rank": 2}):
        reply = await whole.http.post("/v1/completions", json={"model": "tasks", "prompt": "x", **fields})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == [*(fields or {"task_id": 0})][-1]
    reply = await whole.http.delete("/admin/adapters/tasks", headers=ADMIN)
    assert reply.status_code == 200
    async with asyncio.timeout(20):
        while (await whole.client.refresh_stats()).tiers.keys() != {record.version for record in whole.registry.list()}:
            await asyncio.sleep(0.02)


async def test_bad_requests_reach_no_engine(whole: Whole) -> None:
    limit = whole.client.info.max_model_len
    for body, param in (
        ({"prompt": [5] * limit}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": "x", "max_tokens": limit}, "max_tokens"),
        ({"prompt": "x", "logit_bias": {"400": 1}}, "logit_bias"),
    ):
        reply = await whole.http.post("/v1/completions", json={"model": "a", **body})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param


async def test_a_dead_engine_is_503_and_comes_back(whole: Whole) -> None:
    assert (await whole.http.get("/readyz")).status_code == 200
    expected = await whole.complete(model="a", prompt="the cat")
    body = {"model": "a", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    streams = [asyncio.create_task(whole.http.post("/v1/completions", json=body)) for _ in range(4)]
    while (await whole.client.refresh_stats()).running < 4:
        await asyncio.sleep(0.005)
    assert whole.client.pid is not None
    os.kill(whole.client.pid, signal.SIGKILL)
    for reply in await asyncio.gather(*streams):
        if reply.status_code == 503:
            assert reply.json()["error"]["code"] == "engine_unavailable"
        else:
            assert events(reply)[-1]["error"]["code"] == "engine_unavailable"
    reply = await whole.http.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert reply.status_code in (200, 503)
    async with asyncio.timeout(60):
        while (await whole.http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
    again = await whole.complete(model="a", prompt="the cat")
    assert again["choices"] == expected["choices"]
    metrics = (await whole.http.get("/metrics")).text
    assert "weft_engine_restarts_total 1.0" in metrics
