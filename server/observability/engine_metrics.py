"""The engine's newest snapshot as Prometheus metrics, collected at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from weft.server.engine.info import AdapterStats, EngineStats, ModelInfo
from weft.server.engine.request import COMPOSED
from weft.server.registry.names import Names
from weft.server.registry.records import BASE, AdapterRecord, residency

TIERS = ("device", "host", "loading", "disk")

GAUGES: Mapping[str, tuple[str, str]] = {
    "step_adapters": ("weft_step_adapters", "Distinct adapters in the last forward pass, the base not counted."),
    "max_step_adapters": ("weft_step_adapters_max", "Most distinct adapters there have been in one forward pass."),
    "blocks_used": ("weft_kv_cache_blocks_used", "Pages of the KV cache in use."),
    "blocks_total": ("weft_kv_cache_blocks", "Pages of the KV cache."),
    "slots_used": ("weft_adapter_slots_used", "Device slots that hold an adapter."),
    "slots_total": ("weft_adapter_slots", "Device slots for adapters."),
    "device_bytes_total": ("weft_adapter_device_capacity_bytes", "Device memory set aside for adapters."),
}
PROXY_GAUGES: Mapping[str, tuple[str, str]] = {
    "running": ("weft_proxy_streams_running", "Streams of tokens running on a proxy model."),
    "blocks_used": ("weft_proxy_kv_cache_blocks_used", "Pages of a proxy model's KV cache in use."),
    "blocks_total": ("weft_proxy_kv_cache_blocks", "Pages of a proxy model's KV cache."),
    "device_bytes": ("weft_proxy_adapter_device_bytes", "Device memory that adapters of a proxy model use."),
}
COUNTERS: Mapping[str, tuple[str, str]] = {
    "steps": ("weft_steps", "Forward passes."),
    "batch_tokens": ("weft_batch_tokens", "Tokens that went through forward passes."),
    "preemptions": ("weft_preemptions", "Requests put back into the queue because pages ran out."),
    "prefix_cache_queries": ("weft_prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("weft_prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "adapter_prompt_tokens": (
        "weft_adapter_prompt_tokens",
        "Virtual tokens of adapters' own prompts computed: once per adapter, none per request.",
    ),
    "evictions": ("weft_adapter_evictions", "Adapters that lost their device slot to another."),
    "composition_hits": ("weft_composition_hits", "Requests whose composition had been made before."),
}
SUMMARIES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("loads", "load_seconds_sum"): ("weft_adapter_load_seconds", "Transfers of adapters to the device."),
    ("compositions", "composition_seconds_sum"): ("weft_composition_seconds", "Weighing adapters into a slot."),
}
ADAPTER_COUNTERS: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("weft_prompt_tokens", "Prompt tokens accepted."),
    "generation_tokens": ("weft_generation_tokens", "Tokens generated."),
}


class EngineView(Protocol):
    """What is read of ``EngineClient``."""

    stats: EngineStats
    lives: int
    on_stats: list[Callable[[EngineStats, int], None]]

    @property
    def ready(self) -> bool: ...

    @property
    def info(self) -> ModelInfo: ...


class AdapterView(Protocol):
    """What is read of ``AdapterRegistry``."""

    on_unloaded: list[Callable[[str], None]]
    names: Names

    def list(self) -> list[AdapterRecord]: ...


class Totals:
    """Counters over all lives of the engine: each life's start at 0, these never fall."""

    def __init__(self) -> None:
        self._life = 0
        self._last = EngineStats()
        self._before: dict[tuple[str, str], float] = {}

    def update(self, stats: EngineStats, life: int) -> None:
        """A snapshot of the engine's ``life``-th life."""
        if life != self._life:
            for name in (*COUNTERS, *(field for fields in SUMMARIES for field in fields)):
                self._before["", name] = self.value(name)
            for adapter in {*self._last.adapters, *(adapter for adapter, _ in self._before)}:
                for name in ADAPTER_COUNTERS:
                    self._before[adapter, name] = self.of_adapter(adapter, name)
            self._life = life
        self._last = stats

    def value(self, name: str) -> float:
        return self._before.get(("", name), 0.0) + float(getattr(self._last, name))

    def of_adapter(self, adapter: str, name: str) -> float:
        """``adapter`` as the engine names it: "" is the base."""
        now = self._last.adapters.get(adapter, AdapterStats())
        return self._before.get((adapter, name), 0.0) + float(getattr(now, name))

    def forget(self, adapter: str) -> None:
        for name in ADAPTER_COUNTERS:
            self._before.pop((adapter, name), None)


class EngineCollector(Collector):
    """Series of the base and of the adapters that are served, and no others."""

    def __init__(self, client: EngineView, adapters: AdapterView) -> None:
        self._client = client
        self._adapters = adapters
        self._totals = Totals()
        client.on_stats.append(self._totals.update)
        adapters.on_unloaded.append(self._totals.forget)

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is collected at registration: the engine may not run yet

    def collect(self) -> Iterator[Metric]:
        stats, records = self._client.stats, self._adapters.list()
        yield _gauge("weft_engine_up", "Whether requests are being served.", self._client.ready)
        restarts = max(0, self._client.lives - 1)
        yield CounterMetricFamily("weft_engine_restarts", "Times the engine was started again.", value=restarts)
        yield from self._engine(stats)
        yield from self._traffic(stats)
        yield from _residency(stats, records)
        yield from _proxy_models(stats)
        if self._client.lives:
            yield from _vllm(stats, self._client.info)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        for field, (name, text) in GAUGES.items():
            yield _gauge(name, text, getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=self._totals.value(field))
        yield _gauge("weft_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", _kv_usage(stats))
        for (count, total), (name, text) in SUMMARIES.items():
            yield SummaryMetricFamily(
                name, text, count_value=int(self._totals.value(count)), sum_value=self._totals.value(total)
            )

    def _traffic(self, stats: EngineStats) -> Iterator[Metric]:
        # label -> the engine's name
        names = {BASE: "", COMPOSED: COMPOSED, **{id: id for id in self._adapters.names.ids()}}
        for field, text in (("running", "Requests being generated."), ("waiting", "Requests waiting for their turn.")):
            gauge = GaugeMetricFamily(f"weft_requests_{field}", text, labels=("adapter",))
            for label, name in names.items():
                gauge.add_metric((label,), getattr(stats.adapters.get(name, AdapterStats()), field))
            yield gauge
        for field, (metric, text) in ADAPTER_COUNTERS.items():
            counter = CounterMetricFamily(metric, text, labels=("adapter",))
            for label, name in names.items():
                counter.add_metric((label,), self._totals.of_adapter(name, field))
            yield counter


def _residency(stats: EngineStats, records: Iterable[AdapterRecord]) -> Iterator[Metric]:
    info = InfoMetricFamily("weft_adapter", "An adapter and how it is served.", labels=("adapter",))
    tier = GaugeMetricFamily("weft_adapter_tier", "1 for the tier an adapter is in.", labels=("adapter", "tier"))
    size = GaugeMetricFamily("weft_adapter_bytes", "Size in the serving dtype.", labels=("adapter",))
    holds = GaugeMetricFamily("weft_adapter_references", "Live requests on the version.", labels=("adapter",))
    for record in records:
        facts = {"version": record.version, "method": record.info.method, "state": record.state}
        info.add_metric((record.id,), facts)
        where, references = residency(record, stats)
        for name in TIERS:
            tier.add_metric((record.id, name), where == name)
        size.add_metric((record.id,), record.info.nbytes)
        holds.add_metric((record.id,), references)
    memory = GaugeMetricFamily("weft_adapter_memory_bytes", "Memory that adapters use, by tier.", labels=("tier",))
    memory.add_metric(("device",), stats.device_bytes)
    memory.add_metric(("host",), stats.host_bytes)
    yield from (info, tier, size, holds, memory)


def _proxy_models(stats: EngineStats) -> Iterator[Metric]:
    for field, (name, text) in PROXY_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=("model",))
        for model, of in stats.proxies.items():
            gauge.add_metric((model,), getattr(of, field))
        yield gauge


def _vllm(stats: EngineStats, model: ModelInfo) -> Iterator[Metric]:
    """What llm-d and the Gateway API inference extension read, under the names and labels vLLM gives them."""
    yield _gauge("vllm:num_requests_running", "Requests being generated.", stats.running)
    yield _gauge("vllm:num_requests_waiting", "Requests waiting for their turn.", stats.waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", _kv_usage(stats))
    sizes = (str(model.block_size), str(model.num_blocks))
    cache = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=("block_size", "num_gpu_blocks"))
    cache.add_metric(sizes, 1)
    yield cache
    # One series, whose value is the time: a reader that finds several takes the newest.
    labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    lora = GaugeMetricFamily(
        "vllm:lora_requests_info", "Adapters with requests; the value is unix time.", labels=labels
    )
    running = ",".join(sorted(name for name, one in stats.adapters.items() if name and one.running))
    waiting = ",".join(sorted(name for name, one in stats.adapters.items() if name and one.waiting))
    lora.add_metric((str(model.max_adapters), running, waiting), time.time())
    yield lora


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _kv_usage(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
