"""Adapters saved by the real ``peft``, and what ``peft`` computes with one of them alone (the oracle)."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import ArrowConfig, LoraConfig, PeftConfig, PeftModel, PeftType, create_arrow_model, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save_file
from transformers import DynamicCache

from tests.support.models import State, load_model, state_of


def make_lora(base: Path, folder: Path, *, seed: int = 0, scale: float = 0.5, **lora_config: Any) -> Path:
    """Save a LoRA adapter for the model in ``base`` to ``folder`` with ``peft`` and return ``folder``.

    Args:
        base: a model folder, as ``tiny_model`` makes.
        seed: of the weights; other seeds give other adapters.
        scale: size of each site's update relative to its input; 0.5 changes the greedy tokens, the logits stay O(10).
        lora_config: fields of ``peft.LoraConfig``. ``task_type`` is CAUSAL_LM unless given.
    """
    config = LoraConfig(**{"task_type": "CAUSAL_LM", **lora_config})
    return _put(_made(base, state_of(base), pickle.dumps(config), seed, scale, _randomise), folder)


def make_adapter(base: Path, folder: Path, config: PeftConfig, *, seed: int = 0, scale: float = 0.3) -> Path:
    """Save an adapter of any of peft's methods for the model in ``base`` to ``folder`` and return ``folder``.

    Args:
        seed: of the weights; other seeds give other adapters.
        scale: size of the noise on every trained parameter: enough to change the greedy tokens.
    """
    return _put(_made(base, state_of(base), pickle.dumps(config), seed, scale, _add_noise), folder)


@lru_cache(maxsize=128)
def _made(
    base: Path, state: State, config: bytes, seed: int, scale: float, draw: Callable[[PeftModel, float], None]
) -> dict[str, bytes]:
    """What peft saves of a new adapter with drawn weights, by name of file. Kept: many tests change the same adapter.

    Args:
        state: of the base.
        config: the pickled ``PeftConfig``.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        # peft warns of patterns without a match, of fan_in_fan_out on Conv1D, of saved embeddings: all meant here.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(load_model(base), pickle.loads(config))
        draw(adapted, scale)
        with TemporaryDirectory() as folder:
            _save(adapted, Path(folder))
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _save(adapted: PeftModel, folder: Path) -> None:
    """All but the model card, which nobody reads and which takes as long as making a small adapter."""
    with mock.patch.object(PeftModel, "create_or_update_model_card"):
        adapted.save_pretrained(str(folder))


def make_arrow(base: Path, folder: Path, arrow: ArrowConfig, *, experts: int = 3, **lora_config: Any) -> Path:
    """Save a router between ``experts`` LoRA adapters, as ``peft.create_arrow_model`` makes it, and return ``folder``.

    Args:
        lora_config: of every expert; their scales differ. Where ``arrow`` asks for it, there is general knowledge too.
    """
    names = [f"expert-{index}" for index in range(experts + arrow.use_gks)]
    paths = [
        str(make_lora(base, folder.parent / f"{folder.name}-{name}", seed=seed, lora_alpha=seed + 1, **lora_config))
        for seed, name in enumerate(names)
    ]
    model = load_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _save(create_arrow_model(model, paths[:experts], arrow, paths[experts:]), folder)
    return folder


def load_arrow(model: Any, folder: Path) -> Any:
    """The model with the router and the experts in ``folder``, which peft itself can only put together anew."""
    config = json.loads((folder / "arrow_router" / "adapter_config.json").read_text())["arrow_config"]
    tasks, general = ([str(folder / n) for n in config.pop(f"{kind}_adapter_names")] for kind in ("task", "gks"))
    return create_arrow_model(model, tasks, ArrowConfig(**config), general)


class Generation(NamedTuple):
    """Greedy tokens, and the log-probabilities ``[steps, vocab]`` (fp32) each was chosen from."""

    tokens: list[int]
    logprobs: torch.Tensor


class PeftReference:
    """The base with at most one adapter, run by transformers and peft alone, in fp32 on the CPU, without a cache, but
    where what is computed depends on which tokens a forward pass has.

    Args:
        task_id: for an adapter that needs one.
    """

    def __init__(self, base: Path, adapter: Path | None = None, task_id: int | None = None) -> None:
        model: Any = load_model(base, eager=True)
        if adapter is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                routed = (adapter / "arrow_router").is_dir()
                model = load_arrow(model, adapter) if routed else PeftModel.from_pretrained(model, str(adapter))
        self.model = model.eval()
        self._arguments = {} if task_id is None else {"task_ids": torch.tensor([task_id])}

    @torch.no_grad()
    def logits(self, ids: Sequence[int], prompt_len: int | None = None) -> torch.Tensor:
        """``[len(ids), vocab]``; what an adapter puts in front of ``ids`` is left out.

        Args:
            prompt_len: those of ``ids`` that were not generated; None: all.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            configs = getattr(self.model, "peft_config", {}).values()
            if prompt_len is not None and any(config.peft_type == PeftType.LILY for config in configs):
                return self._stepped(list(ids), prompt_len)
            tokens = torch.tensor([list(ids)])
            out: torch.Tensor = self.model(input_ids=tokens, use_cache=False, **self._arguments).logits[0]
        return out[-len(ids) :]

    def _stepped(self, ids: list[int], prompt_len: int) -> torch.Tensor:
        """As ``generate`` runs the model: the prompt at once, then one token after the other, with a cache."""
        cache, logits = DynamicCache(), []
        for tokens in (ids[:prompt_len], *([token] for token in ids[prompt_len:])):
            out = self.model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, **self._arguments)
            logits.append(out.logits[0])
        return torch.cat(logits)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> Generation:
        """Greedy continuation of ``ids``; goes on past the end-of-sequence token."""
        tokens: list[int] = []
        logprobs: list[torch.Tensor] = []
        for _ in range(max_new_tokens):
            logprobs.append(self.logits([*ids, *tokens], len(ids))[-1].log_softmax(-1))
            tokens.append(int(logprobs[-1].argmax()))
        return Generation(tokens, torch.stack(logprobs))


def peft_logits(base: Path, adapter: Path | None, ids: Sequence[int]) -> torch.Tensor:
    """Logits ``[len(ids), vocab]`` of ``ids`` under ``adapter`` (or the base alone), by peft, fp32."""
    return PeftReference(base, adapter).logits(ids)


def peft_generate(base: Path, adapter: Path | None, ids: Sequence[int], max_new_tokens: int) -> Generation:
    """Greedy ``(tokens, logprobs [steps, vocab])`` by peft, fp32. For many prompts build one ``PeftReference``."""
    return PeftReference(base, adapter).generate(ids, max_new_tokens)


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of a saved adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors of a saved adapter by what ``change`` makes of them."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load(path.read_bytes())).items()}, path)


def _add_noise(adapted: PeftModel, scale: float) -> None:
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            fan = math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 1.0
            parameter.add_(torch.randn_like(parameter) * scale / (fan if fan > 1 else 1.0))


def _randomise(model: PeftModel, scale: float) -> None:
    """Give every site an update of size ``scale`` relative to its input, whatever the config's own scaling."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, down in layer.lora_A.items():
            up, rank, width = layer.lora_B[name], down.out_features, down.in_features
            factor = abs(layer.scaling[name]) or 1.0
            down.weight.normal_(std=1.0 / math.sqrt(width))
            up.weight.normal_(std=scale / math.sqrt(rank) / factor)
            if up.bias is not None:
                up.bias.normal_(std=scale / factor)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        elif parameter.requires_grad and ".lora_" not in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
