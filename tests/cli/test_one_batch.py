"""One server, an adapter of every case of every method, one mixed batch over HTTP; and the table in docs/ of it."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import AdaptionPromptConfig, ArrowConfig, LoraConfig, MultitaskPromptTuningConfig, PeftConfig

from tests.adapters.cases import all_cases, chosen_of
from tests.cli.serving import Serving, add_tokenizer, serving
from tests.engine.harness import random_prompt
from tests.engine.test_prompts import prompt_configs
from tests.engine.test_variants import INVOCATION, ActivatedReference, truncated
from tests.engine.variants import lora_variants
from tests.support.adapters import PeftReference, edit_config, make_adapter, make_arrow, make_lora
from tests.support.hub import adapters_of, base_of, expected
from tests.support.matrix import Served, check_page, table
from tests.support.models import VOCAB_SIZE
from tests.support.own_formats import make_chain, make_lotr, make_milora, make_relora

MAX_TOKENS = 24
TOLERANCE = 1e-3
TASK = "CAUSAL_LM"
UNFIT = ("road_default_targets", "supertuning_unsaved")
"""Cases that this base does not allow: one by its widths, one because two of its weights are of equal size."""

SCALES = {"mpt": 20.0, "glora_constants": 0.05}
"""Of the weights that are drawn. One number for a whole matrix, if large, makes peft itself inexact: 6e-4 from fp64."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of the batch.

    Attributes:
        alone: what runs it alone, given the prompt; None: the answer of its library is stored.
        config: of peft.
        body: what its requests need besides.
        ending: of its prompts.
    """

    folder: Path
    alone: Callable[[list[int]], PeftReference] | None
    config: PeftConfig | None = None
    body: dict[str, int] = field(default_factory=dict)
    ending: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that AdapterHub's library saved its adapters for."""
    folder = tmp_path_factory.mktemp("one-batch") / "base"
    shutil.copytree(base_of("llama"), folder)
    add_tokenizer(folder, VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Adapter]:
    """By id: an adapter of every case, saved by its own library."""
    made = {name: Adapter(Path(folder), None) for name, folder in adapters_of("llama").items()}
    made = {f"hub-{name.replace(',', '-')}": adapter for name, adapter in made.items()}
    mpt = MultitaskPromptTuningConfig(task_type=TASK, num_virtual_tokens=21, num_tasks=3, num_ranks=2)
    adaption = AdaptionPromptConfig(task_type=TASK, adapter_len=5, adapter_layers=2)
    configs = {**all_cases(), **prompt_configs(), "mpt": mpt, "adaption_prompt": adaption}
    configs = {name: config for name, config in configs.items() if name not in UNFIT}
    for seed, (name, config) in enumerate(configs.items()):
        scale = SCALES.get(name, 3.0 if name in prompt_configs() else 0.3)
        folder = make_adapter(base, base.parent / name, config, seed=seed, scale=scale)
        body = {"task_id": 2} if name == "mpt" else chosen_of(config)
        made[name] = Adapter(folder, _reference(base, folder, body.get("task_id")), config, body)
    for name, fields in lora_variants("llama").items():
        folder = make_lora(base, base.parent / f"lora-{name}", **fields)
        made[f"lora-{name}"] = Adapter(folder, _reference(base, folder), LoraConfig(task_type=TASK, **fields))
    return {**made, **_unlike_the_others(base)}


def _reference(base: Path, folder: Path | None, task: int | None = None) -> Callable[[list[int]], PeftReference]:
    made = cache(PeftReference)
    return lambda prompt: made(base, folder, task)


def _unlike_the_others(base: Path) -> dict[str, Adapter]:
    """What needs more than a config to make."""
    fields: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    dylora = make_lora(base, base.parent / "dylora", **fields)
    edit_config(dylora, peft_type="DYLORA")
    ranks = truncated(dylora, base.parent / "dylora-2", 2)
    alora = make_lora(base, base.parent / "alora", alora_invocation_tokens=INVOCATION, **fields)
    activated = LoraConfig(task_type=TASK, alora_invocation_tokens=INVOCATION, **fields)
    router = ArrowConfig(top_k=2, rng_seed=3)
    arrow = make_arrow(base, base.parent / "arrow", router, r=3, target_modules=["q_proj", "up_proj"])
    knowing = ArrowConfig(top_k=2, rng_seed=3, use_gks=True)
    general = make_arrow(base, base.parent / "arrow-gks", knowing, r=3, target_modules=["q_proj", "up_proj"])
    links = [{"r": 3, "target_modules": ["q_proj"]}, {"r": 4, "bias": "all", "target_modules": ["q_proj", "up_proj"]}]
    others = {
        "lotr": make_lotr(base, base.parent / "lotr"),
        "chain": make_chain(base, base.parent / "chain", links),
        "milora": make_milora(base, base.parent / "milora"),
        "relora": make_relora(base, base.parent / "relora"),
    }
    return {
        **{name: Adapter(made.folder, _reference(made.model, made.adapter)) for name, made in others.items()},
        "arrow-gks": Adapter(general, _reference(base, general), None),
        "dylora": Adapter(dylora, _reference(base, ranks), None, {"lora_rank": 2}),
        "alora": Adapter(alora, ActivatedReference(base, alora), activated, ending=(*INVOCATION, 5)),  # type: ignore[arg-type]
        "arrow": Adapter(arrow, _reference(base, arrow), None),
    }


@pytest.fixture(scope="module")
def server(base: Path, adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    count = len(adapters) + 1
    named = [text for id, adapter in adapters.items() for text in ("--adapter", f"{id}={adapter.folder}")]
    limits = ["--max-num-seqs", count, "--max-adapters", count, "--max-num-batched-tokens", 768, "--block-size", 8]
    arguments = [base, "--dtype", "float32", "--admin-key", "admin", "--adapter-memory", "128MiB", *limits, *named]
    with serving(tmp_path_factory.mktemp("state"), *arguments) as running:
        yield running


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], **fields: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    reply = await client.post("/v1/completions", json={**body, "logprobs": 1, "return_token_ids": True})
    assert reply.status_code == 200, f"{model}: {reply.text}"
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def ask_all(url: str, asked: dict[str, tuple[list[int], dict[str, int]]]) -> dict[str, dict[str, Any]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        answers = await asyncio.gather(*(ask(client, id, prompt, **body) for id, (prompt, body) in asked.items()))
    return dict(zip(asked, answers, strict=True))


def assert_as_alone(id: str, answer: dict[str, Any], prompt: list[int], oracle: PeftReference) -> None:
    """Greedy tokens of the adapter alone in its own library, with its log-probabilities."""
    tokens: list[int] = answer["token_ids"]
    assert len(tokens) == MAX_TOKENS
    steps = oracle.logits([*prompt, *tokens], len(prompt)).log_softmax(-1)[len(prompt) - 1 : -1]
    assert tokens == steps.argmax(-1).tolist(), id
    alone = steps.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(alone, abs=TOLERANCE), id


@pytest.mark.parametrize("round", [1, 2])
def test_every_method_at_once_over_http(round: int, server: Serving, base: Path, adapters: dict[str, Adapter]) -> None:
    rng = random.Random(round)
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    base_id = next(model["id"] for model in models if model["id"] not in adapters)
    everyone = {**adapters, base_id: Adapter(base, _reference(base, None))}
    stored = {f"hub-{name.replace(',', '-')}": answer for name, answer in expected("llama").items()}
    prompts = {
        id: [*random_prompt(rng, 8, 40), *adapter.ending] if adapter.alone else stored[id].prompt
        for id, adapter in everyone.items()
    }
    answers = asyncio.run(ask_all(server.url, {id: (prompts[id], everyone[id].body) for id in everyone}))
    for id, answer in answers.items():
        alone = everyone[id].alone
        if alone is not None:
            assert_as_alone(id, answer, prompts[id], alone(prompts[id]))
            continue
        assert answer["token_ids"] == stored[id].tokens, id
        assert answer["logprobs"]["token_logprobs"] == pytest.approx(stored[id].logprobs, abs=TOLERANCE), id
    metrics = httpx.get(f"{server.url}/metrics").text
    most = re.search(r"^weft_step_adapters_max\S* (\S+)$", metrics, re.MULTILINE)
    assert most is not None and float(most[1]) == len(adapters)


def test_the_support_matrix_is_what_was_served(
    server: Serving, adapters: dict[str, Adapter], pytestconfig: pytest.Config
) -> None:
    headers = {"Authorization": "Bearer admin"}
    rows = []
    with httpx.Client(base_url=server.url, headers=headers) as client:
        for id, adapter in adapters.items():
            shown = client.get(f"/admin/adapters/{id}").json()
            rows.append(Served(shown["method"], tuple(shown["forms"]), adapter.config, tuple(adapter.body)))
    check_page(table(rows), write=pytestconfig.getoption("--write-matrix"))
