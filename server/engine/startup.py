"""From a configuration to a model that is loaded, checked against transformers, and ready for adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from weft.adapters.base import Base
from weft.adapters.forms import CompiledAdapter
from weft.adapters.methods import compile_adapter
from weft.adapters.mixture_sites import attach_mixtures
from weft.adapters.residency import Residency
from weft.adapters.side_sites import attach_side
from weft.adapters.sites import attach_sites
from weft.adapters.slots import SlotPool
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import attention, loading, selfcheck
from weft.server.engine.kv_cache import KVCache, bytes_per_block, count_blocks
from weft.server.engine.model import ModelRunner
from weft.server.engine.side import SideNetworks

Progress = Callable[[str], None]
"""Told what start-up is busy with."""


class CompileFolder(Protocol):
    """Compiles the adapter in a folder for the base, as a request chose it; raises AdapterError."""

    def __call__(self, folder: Path, version: str, chosen: Mapping[str, int] | None = None) -> CompiledAdapter: ...


@dataclass(frozen=True)
class Loaded:
    """What the engine runs on.

    Attributes:
        compile_folder: what ``adapters`` compiles with.
        fingerprint: of the base, for the identity of KV blocks.
        vocab_size: width of the logits.
        max_model_len: tokens of prompt and output together.
    """

    runner: ModelRunner
    adapters: Residency
    compile_folder: CompileFolder
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def load(config: EngineConfig, progress: Progress) -> Loaded:
    """Load the base and everything around it.

    Raises:
        ConfigError: the model or a setting cannot be honoured.
    """
    try:
        return _load(config, progress)
    except attention.UnsupportedModel as error:
        raise ConfigError(f"model {config.model!r} cannot be served exactly: {error}") from error


def _load(config: EngineConfig, progress: Progress) -> Loaded:
    device = loading.resolve_device(config.device)
    progress("reading the configuration")
    hf_config = loading.load_config(config)
    progress("loading weights")
    model = loading.load_model(config, hf_config, device)
    fingerprint = loading.fingerprint(model)
    limit = loading.max_model_len(config, model.config)
    progress("comparing with transformers' own forward")
    attention.register()
    reference = selfcheck.reference_logits(model, limit)
    shapes = selfcheck.cache_shapes(model)
    model.set_attn_implementation(attention.NAME)
    num_blocks = count_blocks(config, bytes_per_block(shapes, config.block_size, model.dtype), limit, device)
    cache = KVCache(shapes, num_blocks=num_blocks, block_size=config.block_size, dtype=model.dtype, device=device)
    base = Base.of(model)
    pool = _slot_pool(config, base, model.dtype, device)
    base = replace(base, adapter_memory=pool.nbytes_total)
    rows = attach_sites(model, base, pool)
    attach_mixtures(model, base, pool, rows)
    embed = model.get_input_embeddings()
    side = SideNetworks(base, pool, cache, memory=pool.nbytes_total, active=attach_side(model, base, pool), embed=embed)
    runner = ModelRunner(model, cache, rows, side, device)
    selfcheck.verify(runner, reference, limit)

    def compile_folder(folder: Path, version: str, chosen: Mapping[str, int] | None = None) -> CompiledAdapter:
        return compile_adapter(folder, base, version=version, dtype=base.dtype, chosen=chosen)

    return Loaded(
        runner=runner,
        adapters=Residency(pool, compile_folder, host_bytes=config.adapter_host_memory),
        compile_folder=compile_folder,
        fingerprint=fingerprint,
        vocab_size=reference[0].shape[-1],
        max_model_len=_fit_model_len(config, limit, num_blocks),
        eos_token_ids=loading.eos_token_ids(model),
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
        memory = torch.cuda.mem_get_info(device)[1] // 10 if device.type == "cuda" else 1 << 30
    try:
        return SlotPool(base, num_slots=config.max_adapters, memory=memory, dtype=dtype, device=device)
    except ValueError as error:
        raise ConfigError(f"adapter_memory: {error}") from error
