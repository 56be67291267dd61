"""What the engine says of itself: plain data, sent to the HTTP side as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.adapters.choices import Choice


@dataclass(frozen=True)
class ModelInfo:
    """The frozen base, once loaded.

    Attributes:
        fingerprint: digest of the configuration and the weights' identity; the root of every KV block's key.
        eos_token_ids: any of them ends a request, unless ``ignore_eos``.
        num_blocks, block_size: the KV cache, in pages and tokens per page.
        load_seconds: from the start of loading to ready.
        proxies: the further frozen models, by name.
    """

    model: str
    model_type: str
    architecture: str
    fingerprint: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_adapters: int
    load_seconds: float
    proxies: dict[str, ModelInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterInfo:
    """How an adapter is served.

    Attributes:
        version: digest of its content.
        method: how it was trained ("LORA").
        forms: the runtime forms it compiled to ("LowRank", "Bias").
        rank: the largest rank at any site.
        num_sites: modules of the base it attaches to.
        nbytes: of its tensors in the serving dtype.
        virtual_tokens: that it puts in front of every prompt; they count against the context.
        position_offset: position of the first real token behind them.
        choices: what requests choose of it.
        invocation: tokens from whose last occurrence in a prompt on it works; empty: from the first token on.
        whole_prompts: a prompt is computed in one pass, and its length bounded by that of a pass.
    """

    version: str
    method: str
    forms: tuple[str, ...]
    rank: int
    num_sites: int
    nbytes: int
    virtual_tokens: int = 0
    position_offset: int = 0
    choices: tuple[Choice, ...] = ()
    invocation: tuple[int, ...] = ()
    whole_prompts: bool = False


@dataclass(frozen=True)
class AdapterStats:
    """Counters of one adapter name since the engine started ("" is the base)."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(frozen=True)
class ModelStats:
    """Of one model what there is of every model. Counters and gauges as in ``EngineStats``.

    Attributes:
        running: rows; requests with logit arithmetic have several.
    """

    running: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    tiers: dict[str, str] = field(default_factory=dict)
    refcounts: dict[str, int] = field(default_factory=dict)
    slots_used: int = 0
    slots_total: int = 0
    device_bytes: int = 0
    device_bytes_total: int = 0
    host_bytes: int = 0
    loads: int = 0
    load_seconds_sum: float = 0.0
    evictions: int = 0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters count from the engine's start and never fall; the rest are gauges.

    Pages, slots and adapter memory are the main model's; requests, steps, tokens and preemptions are counted once for
    all models.

    Attributes:
        step_adapters: distinct adapters (the base not counted) in the last forward pass.
        max_step_adapters: the most there have been in one forward pass.
        adapter_prompt_tokens: virtual tokens of soft prompts computed, once per adapter and load.
        adapters: by adapter name.
        tiers: version -> "device", "host", "loading" or "disk"; of what is derived from it, the nearest counts.
        refcounts: version -> live requests holding it.
        device_bytes, host_bytes: adapter memory in use per tier.
        steps, batch_tokens: forward passes, and tokens that went through them (counters).
        load_seconds_sum, loads: transfers to the device.
        proxies: of the further models, by name.
        compositions, composition_seconds_sum: weighting steps. composition_hits: requests that found theirs made.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    steps: int = 0
    step_adapters: int = 0
    max_step_adapters: int = 0
    adapter_prompt_tokens: int = 0
    batch_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    adapters: dict[str, AdapterStats] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)
    refcounts: dict[str, int] = field(default_factory=dict)
    slots_used: int = 0
    slots_total: int = 0
    device_bytes: int = 0
    device_bytes_total: int = 0
    host_bytes: int = 0
    loads: int = 0
    load_seconds_sum: float = 0.0
    evictions: int = 0
    compositions: int = 0
    composition_seconds_sum: float = 0.0
    composition_hits: int = 0
    proxies: dict[str, ModelStats] = field(default_factory=dict)
