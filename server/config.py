"""Configuration of the engine: frozen, composed, validated once. The command line builds it (``cli``)."""

from __future__ import annotations

from dataclasses import dataclass


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names it and says what to do."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs to start. "auto" is resolved once, at start.

    Attributes:
        model: local folder or hub id of a Hugging Face causal LM.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        quantization: "none" (as the checkpoint is), "nf4" or "int8": the linears' weights are kept in 4 or 8 bits.
        max_model_len: tokens of prompt and output together; None: the model's own limit.
        max_num_seqs: rows decoding at once.
        max_num_batched_tokens: tokens in one forward pass.
        block_size: tokens in one page of the KV cache.
        kv_cache_memory: bytes for the KV caches of all models, which get as many pages each; None: a share of what is
            free (see gpu_memory_utilization on a GPU; on a CPU as many as max_num_seqs rows of max_model_len need, at
            most a quarter of the machine's memory).
        gpu_memory_utilization: share of the GPU's memory to use, in (0, 1].
        cuda_graphs: on a GPU, replay recorded decode steps instead of launching each kernel.
        attention_backend: what computes attention on a GPU: "auto" (the quickest of those that are there and agree with
            the reference), "triton", "varlen" (FlashAttention by way of torch) or "flashinfer".
        async_scheduling: launch a step before the tokens of the one before it are known; None: on a GPU.
        enable_prefix_caching: share KV blocks of equal identity between requests.
        adapter_memory: bytes on the device for the weights of each model's adapters; None: 1 GiB on CPU, a tenth of a
            GPU's memory for all models.
        adapter_host_memory: bytes in host memory for each model's adapters that are not on the device.
        max_adapters: device slots of each model, so the most distinct adapters in one batch.
        max_queued_requests: waiting requests before new ones are refused with 429.
        trust_remote_code: run modelling code from the checkpoint.
        proxy_models: (name, local folder or hub id) of further frozen models, for logit arithmetic. Device, dtype,
            quantization and limits are as for the main one; ``revision`` is the main one's alone.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    attention_backend: str = "auto"
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    adapter_memory: int | None = None
    adapter_host_memory: int = 4 << 30
    max_adapters: int = 64
    max_queued_requests: int = 1024
    trust_remote_code: bool = False
    revision: str | None = None
    proxy_models: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _choice("device", self.device, ("auto", "cpu", "cuda"))
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _choice("attention_backend", self.attention_backend, ("auto", "triton", "varlen", "flashinfer"))
        check_quantization(self.quantization)
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_adapters", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_model_len", "kv_cache_memory", "adapter_memory", "adapter_host_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        names = [name for name, _ in self.proxy_models]
        if not all(name and path for name, path in self.proxy_models) or len(set(names)) < len(names):
            raise ConfigError(f"proxy_models must be pairs of distinct names and models, got {self.proxy_models}")


def check_quantization(value: str) -> None:
    """Raise ConfigError unless ``value`` is a way a base can be quantised."""
    _choice("quantization", value, ("none", "nf4", "int8"))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
