"""From a configuration to models that are loaded, checked against transformers, and ready for adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.adapters.forms import CompiledAdapter
from weft.adapters.methods import compile_adapter
from weft.adapters.mixture_sites import attach_mixtures
from weft.adapters.overlap import overlap_for
from weft.adapters.residency import Residency
from weft.adapters.side_sites import attach_side
from weft.adapters.sites import attach_sites
from weft.adapters.slots import SlotPool
from weft.kernels.paged_attention.backends import Layer
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import attention, loading, selfcheck
from weft.server.engine.attention_backends import attention_for
from weft.server.engine.fused import fuse
from weft.server.engine.fused_rotary import fuse_rotary
from weft.server.engine.graphs import GraphRunner, capture_for
from weft.server.engine.host_memory import keep_freed_memory, read_ahead
from weft.server.engine.kv_cache import KVCache, bytes_per_block, count_blocks
from weft.server.engine.model import ModelRunner
from weft.server.engine.side import SideNetworks

Progress = Callable[[str], None]
"""Told what start-up is busy with."""
Result = TypeVar("Result")


class CompileFolder(Protocol):
    """Compiles the adapter in a folder for the base, as a request chose it; raises AdapterError."""

    def __call__(self, folder: Path, version: str, chosen: Mapping[str, int] | None = None) -> CompiledAdapter: ...


@dataclass(frozen=True)
class Loaded:
    """One model that the engine runs.

    Attributes:
        model: folder or hub id.
        compile_folder: what ``adapters`` compiles with.
        fingerprint: of the base, for the identity of KV blocks.
        vocab_size: width of the logits.
        max_model_len: tokens of prompt and output together.
        seconds: from the start of loading to ready.
        graphs: what runs decode steps on a GPU; None: ``runner`` does.
    """

    model: str
    runner: ModelRunner
    adapters: Residency
    compile_folder: CompileFolder
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    seconds: float
    graphs: GraphRunner | None = None


@dataclass(frozen=True)
class _Weights:
    """A model before it is served.

    Attributes:
        config: its own. limit: tokens that it can place.
        reference: what transformers' own forward computes.
        layers: what each asks of attention.
    """

    config: EngineConfig
    model: PreTrainedModel
    device: torch.device
    fingerprint: str
    limit: int
    reference: list[torch.Tensor]
    layers: list[Layer]
    started: float

    @property
    def block_bytes(self) -> int:
        return bytes_per_block([layer.cache_shape for layer in self.layers], self.config.block_size, self.model.dtype)


def load(config: EngineConfig, arrived: threading.Event, progress: Progress) -> list[Loaded]:
    """Load the base, the further models, and everything around them; the base is the first.

    Args:
        arrived: set when an adapter of any of them is loaded.

    Raises:
        ConfigError: a model or a setting cannot be honoured.
    """
    if loading.resolve_device(config.device).type == "cpu":
        keep_freed_memory()
    weights = [_checked(config, partial(_read, config, None, progress))]
    for name, path in config.proxy_models:
        # What fits the main model need not fit this one: its own limit counts, up to the main one's.
        own = replace(config, model=path, revision=None, max_model_len=None)
        tell = partial(_tell_of, name, progress)
        weights.append(_checked(own, partial(_read, own, config.max_model_len, tell)))
    # Only now, with all weights in their places, is it known what is left for the caches.
    blocks = count_blocks(config, [w.block_bytes for w in weights], [w.limit for w in weights], weights[0].device)
    return [_checked(w.config, partial(_serve, w, count, arrived)) for w, count in zip(weights, blocks, strict=True)]


def _tell_of(name: str, progress: Progress, stage: str) -> None:
    progress(f"{name}: {stage}")


def _checked(config: EngineConfig, step: Callable[[], Result]) -> Result:
    try:
        return step()
    except attention.UnsupportedModel as error:
        raise ConfigError(f"model {config.model!r} cannot be served exactly: {error}") from error


def _read(config: EngineConfig, longest: int | None, progress: Progress) -> _Weights:
    started = time.perf_counter()
    device = loading.resolve_device(config.device)
    progress("reading the configuration")
    hf_config = loading.load_config(config)
    progress("loading weights")
    model = loading.load_model(config, hf_config, device)
    read_ahead(model.parameters())
    limit = loading.max_model_len(config, model.config)
    limit = min(limit, longest or limit)
    progress("comparing with transformers' own forward")
    attention.register()
    reference = selfcheck.reference_logits(model, limit)
    fingerprint = loading.fingerprint(model)
    layers = selfcheck.attention_layers(model)
    model.set_attn_implementation(attention.NAME)
    return _Weights(config, model, device, fingerprint, limit, reference, layers, started)


def _serve(weights: _Weights, num_blocks: int, arrived: threading.Event) -> Loaded:
    config, model, device = weights.config, weights.model, weights.device
    limit, reference = weights.limit, weights.reference
    max_model_len = _fit_model_len(config, limit, num_blocks)
    attend = attention_for(config, weights.layers, model.dtype, device, max_model_len)
    shapes = [layer.cache_shape for layer in weights.layers]
    cache = KVCache(shapes, num_blocks=num_blocks, block_size=config.block_size, dtype=model.dtype, device=device)
    base = Base.of(model)
    pool = _slot_pool(config, base, model.dtype, device)
    base = replace(base, adapter_memory=pool.nbytes_total)
    fuse(model, base)
    fuse_rotary(model)
    rows = attach_sites(model, base, pool)
    attach_mixtures(model, base, pool, rows)
    embed = model.get_input_embeddings()
    side = SideNetworks(base, pool, cache, memory=pool.nbytes_total, active=attach_side(model, base, pool), embed=embed)
    runner = ModelRunner(model, cache, rows, side, device, attend)
    selfcheck.verify(runner, reference, limit)

    def compile_folder(folder: Path, version: str, chosen: Mapping[str, int] | None = None) -> CompiledAdapter:
        return compile_adapter(folder, base, version=version, dtype=base.dtype, chosen=chosen)

    vocab_size = reference[0].shape[-1]
    capture, graphs = capture_for(device), None
    if config.cuda_graphs and capture is not None:
        sizes = {"max_rows": config.max_num_seqs, "max_len": max_model_len, "vocab": vocab_size}
        graphs = GraphRunner(runner, pool, frozenset(base.sites), **sizes, capture=capture, overlap=overlap_for(device))
    return Loaded(
        model=config.model,
        runner=runner,
        adapters=Residency(pool, compile_folder, host_bytes=config.adapter_host_memory, arrived=arrived),
        compile_folder=compile_folder,
        fingerprint=weights.fingerprint,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=loading.eos_token_ids(model),
        seconds=time.perf_counter() - weights.started,
        graphs=graphs,
    )


def _fit_model_len(config: EngineConfig, limit: int, num_blocks: int) -> int:
    """A row of full length must fit the KV cache alone, or it could never finish.

    Raises:
        ConfigError: the length was asked for and does not fit.
    """
    room = num_blocks * config.block_size
    if limit <= room:
        return limit
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len is {limit}, but the KV cache holds {room} tokens; lower it or raise kv_cache_memory"
        )
    return room


def _slot_pool(config: EngineConfig, base: Base, dtype: torch.dtype, device: torch.device) -> SlotPool:
    memory = config.adapter_memory
    if memory is None:
        memory = 1 << 30
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[1] // (10 * (1 + len(config.proxy_models)))
    try:
        return SlotPool(base, num_slots=config.max_adapters, memory=memory, dtype=dtype, device=device)
    except ValueError as error:
        raise ConfigError(f"adapter_memory: {error}") from error
