"""Section 1, second half: the engine's greedy tokens in one mixed batch, against transformers and peft with each
adapter alone, in fp32."""

from __future__ import annotations

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gpu.budget import Share
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Between them every form that a plain linear can have, and one that stands in front of the prompt.
ADAPTERS: Mapping[str, Callable[[], Any]] = {
    "lora r8": lambda: peft.LoraConfig(r=8, target_modules=LINEARS),
    "lora r5 of q and v": lambda: peft.LoraConfig(r=5, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "lora r64": lambda: peft.LoraConfig(r=64, target_modules=LINEARS),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=["q_proj", "down_proj"]),
    "road": lambda: peft.RoadConfig(target_modules=["q_proj", "o_proj"]),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=7),
}


def check_engine(
    share: Share, device: torch.device, *, seed: int, tokens: int = 24, adapters: int = 99
) -> dict[str, Any]:
    """Greedy tokens of a row on every adapter and on the base, with CUDA graphs and without, steps launched ahead.

    Returns:
        How many rows agreed; what differed, with the margin by which the oracle preferred its token.
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = save_base(Path(folder) / "base")
        saved, absent = save_adapters(base, Path(folder), list(ADAPTERS)[:adapters])
        rng = random.Random(seed)
        prompts = {name: [rng.randrange(3, 256) for _ in range(rng.randint(3, 40))] for name in (None, *saved)}
        expected = {name: alone(base, saved.get(name), ids, tokens) for name, ids in prompts.items()}
        outcome: dict[str, Any] = {"adapters": list(saved), "not_in_this_peft": absent, "tokens": tokens}
        for graphs in (False, True) if device.type == "cuda" else (False,):
            if share.over:
                share.skip(f"engine end to end, CUDA graphs {graphs}")
                break
            got = together(base, saved, prompts, tokens, device, graphs)
            outcome["with CUDA graphs" if graphs else "eager"] = compare(got, expected)
    return outcome


def save_base(folder: Path) -> Path:
    """A tiny random Llama whose greedy tokens depend on the prompt."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=512)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[1]))
    model.save_pretrained(folder)
    return folder


def save_adapters(base: Path, folder: Path, names: list[str]) -> tuple[dict[str, Path], list[str]]:
    """Random adapters by name; and what this version of peft does not have."""
    saved, absent = {}, []
    for name in names:
        try:
            config = ADAPTERS[name]()
            config.task_type = "CAUSAL_LM"
            adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            absent.append(f"{name}: {error}")
            continue
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    fan = math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 4.0
                    parameter.add_(torch.randn_like(parameter) * 0.7 / fan)
        with mock.patch.object(PeftModel, "create_or_update_model_card"):
            adapted.save_pretrained(str(folder / name))
        saved[name] = folder / name
    return saved, absent


@torch.no_grad()
def alone(base: Path, adapter: Path | None, ids: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy tokens by transformers and peft on the CPU without a cache; by how much each was preferred to the next."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    known, found = list(ids), []
    for _ in range(count):
        best = model(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1].log_softmax(-1).topk(2)
        found.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        known.append(found[-1][0])
    return found


def together(
    base: Path,
    adapters: dict[str, Path],
    prompts: dict[str | None, list[int]],
    count: int,
    device: torch.device,
    graphs: bool,
) -> dict[str | None, list[int]]:
    """The engine's greedy tokens, all rows in one batch."""
    given = {"cuda_graphs": graphs} if "cuda_graphs" in EngineConfig.__dataclass_fields__ else {}
    config = EngineConfig(
        str(base), device=device.type, dtype="float32", max_model_len=256, kv_cache_memory=64 << 20,
        adapter_memory=256 << 20, **given,
    )  # fmt: skip
    found: dict[str | None, list[int]] = {name: [] for name in prompts}
    with closing(Engine(config)) as engine:
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        for name, ids in prompts.items():
            engine.add(EngineRequest(name or "the base", ids, params, adapter=name))
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None, f"{delta.request_id}: {delta.error}"
                found[None if delta.request_id == "the base" else delta.request_id] += delta.token_ids
            engine.wait(0.001)
    return found


def compare(got: dict[str | None, list[int]], expected: dict[str | None, list[tuple[int, float]]]) -> dict[str, Any]:
    """Rows that agree in all tokens; the first difference of the others."""
    differ = []
    for name, tokens in expected.items():
        at = next((i for i, (token, _) in enumerate(tokens) if i >= len(got[name]) or got[name][i] != token), None)
        if at is not None:
            differ.append({"row": name, "token": at, "preferred_by": tokens[at][1], "tokens": len(got[name])})
    return {"rows": len(expected), "equal": len(expected) - len(differ), "differ": differ}
