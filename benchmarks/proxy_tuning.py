"""Proxy-tuning on the demo: its base, which never saw a task, steered by a tuned model a fifth of its size.

    python benchmarks/proxy_tuning.py                   trains the small model once (5500 steps, kept in a cache)
    python benchmarks/proxy_tuning.py --task formal     another task; repeatable

The small base has the demo's tokenizer and curriculum and a fifth of its parameters. Its LoRA for the task is the
expert, the small base as it is the anti-expert (Liu et al., 2024). All is asked of one live server. For each α the
table says how often the answer to a held-out prompt is exactly right, and how much of the way from the demo's base
alone to the demo's own LoRA, tuned on the large base directly, the small expert goes without touching the large model.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from bench_serving import demo_server
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from weft.server.demo import demo_model
from weft.server.demo.adapters import ROWS, THREADS, recipe, tidy_adapter
from weft.server.demo.base import DECAY, RATE, STEPS, as_llama, base_batches, base_config, look_back
from weft.server.demo.batches import example_batches
from weft.server.demo.fit import ATTENTION, SEED, fit
from weft.server.demo.tasks import TASKS, held_out
from weft.server.demo.tasks.task import Example
from weft.server.settings import DEMO_NAME

HIDDEN, INTERMEDIATE, LAYERS = 128, 384, 3
EXPERT_RATE = 2e-3
CONCURRENCY = 16
"""Requests at a time."""


def cache_folder() -> Path:
    """Where the small model is kept: ``$XDG_CACHE_HOME/weft/proxy-tuning``, else under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "proxy-tuning"


def small_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The demo's shape, made narrower and shallower: 0.7 million parameters instead of 3.5."""
    config = base_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = HIDDEN, INTERMEDIATE, LAYERS
    config.layer_types = config.layer_types[:LAYERS]
    return config


def small_base(folder: Path, steps: int) -> Path:
    """The small base, trained if it is not there yet, by the recipe of the demo's own and with its tokenizer."""
    if (folder / "config.json").exists():
        return folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model())
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(small_config(tokenizer))
    model.set_attn_implementation(ATTENTION)
    look_back(model)
    fit(model, base_batches(tokenizer), steps, RATE, DECAY, "small base")
    as_llama(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return folder


def small_expert(folder: Path, base: Path, task: str) -> Path:
    """A LoRA for ``task`` on the small base, trained if it is not there yet, by the recipe of the demo's own."""
    if (folder / "adapter_config.json").exists():
        return folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=ATTENTION)
    torch.manual_seed(SEED)
    how = recipe(task)
    adapted = get_peft_model(model, how.config)
    fit(adapted, example_batches(tokenizer, TASKS[task], ROWS), how.steps, EXPERT_RATE, 0.0, f"small {task}")
    adapted.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    tidy_adapter(folder)
    return folder


def rows(task: str, alphas: list[float]) -> dict[str, dict[str, Any]]:
    """What is asked, as fields of a request, by the name of its row."""
    expert, anti_expert = {"model": "small", "adapter": f"small-{task}"}, {"model": "small"}
    steered = {
        f"steered, α = {alpha:g}": {"proxy": {"expert": expert, "anti_expert": anti_expert, "alpha": alpha}}
        for alpha in alphas
    }
    return {
        "base alone": {},
        # The base's own logits count nothing, and the expert's are all there is.
        "small expert alone": {"logit_arithmetic": [{"weight": 0}, {**expert, "weight": 1}]},
        **steered,
        "base tuned directly": {"model": task},
    }


async def share_right(url: str, task: str, count: int, fields: dict[str, Any]) -> float:
    """The share of held-out examples whose answer is exactly right, greedily."""
    examples = held_out(TASKS[task], count)
    gate = asyncio.Semaphore(CONCURRENCY)

    async def right(client: httpx.AsyncClient, example: Example) -> bool:
        body = {"model": DEMO_NAME, "prompt": example.prompt, "temperature": 0, "max_tokens": 48, **fields}
        async with gate:
            reply = await client.post("/v1/completions", json=body)
        reply.raise_for_status()
        return bool(reply.json()["choices"][0]["text"].strip() == example.completion.strip())

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        return sum(await asyncio.gather(*(right(client, example) for example in examples))) / count


def main(
    task: Annotated[list[str] | None, typer.Option(help="Of the demo's tasks; repeatable; default: classify.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Repeatable; default: 0.5, 1, 2.")] = None,
    count: Annotated[int, typer.Option(help="Held-out examples of a task.")] = 100,
    base_steps: Annotated[int, typer.Option(help="Of training the small base, if it is not there.")] = STEPS,
    cache: Annotated[Path | None, typer.Option(help="Where the small model is kept.")] = None,
) -> None:
    """Train the small model if need be, serve all, ask, print the table."""
    torch.set_num_threads(THREADS)  # sums depend on it
    folder, tasks = cache or cache_folder(), task or ["classify"]
    base = small_base(folder / "base", base_steps)
    adapters = [f"--adapter=small:small-{name}={small_expert(folder / name, base, name)}" for name in tasks]
    table = Table("task", "who answers", "exactly right", "of the way", title=f"{count} held-out examples a task")
    with demo_server(f"--proxy-model=small={base}", *adapters, "--dtype=float32") as url:
        for name in tasks:
            asked = rows(name, alpha or [0.5, 1.0, 2.0])
            shares = {row: asyncio.run(share_right(url, name, count, fields)) for row, fields in asked.items()}
            low, *_, high = shares.values()
            for row, share in shares.items():
                way = f"{(share - low) / (high - low):.0%}" if row.startswith("steered") and high > low else ""
                table.add_row(name, row, f"{share:.1%}", way)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    typer.run(main)
