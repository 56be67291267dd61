"""The exposition: values, labels, what happens over restarts and after an unload."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from weft.server.engine.info import AdapterInfo, AdapterStats, EngineStats, ModelInfo, ModelStats
from weft.server.errors import EngineUnavailable
from weft.server.observability.metrics import Metrics
from weft.server.registry.names import Names
from weft.server.registry.records import AdapterRecord

MODEL = ModelInfo("m", "llama", "Llama", "f", "float32", "cpu", 100, 512, (0,), 1, 128, 16, 64, 8, 0.5)


class Engine:
    def __init__(self) -> None:
        self.stats = EngineStats()
        self.lives = 0
        self.on_stats: list[Callable[[EngineStats, int], None]] = []
        self.ready = False

    @property
    def info(self) -> ModelInfo:
        if not self.lives:
            raise EngineUnavailable("not started")
        return MODEL

    def push(self, stats: EngineStats) -> None:
        self.stats = stats
        for observer in self.on_stats:
            observer(stats, self.lives)

    def start(self) -> None:
        self.lives += 1
        self.ready = True

    def die(self) -> None:
        self.stats = EngineStats()
        self.ready = False


class Adapters:
    kind = "adapter"

    def __init__(self) -> None:
        self.on_unloaded: list[Callable[[str], None]] = []
        self.names = Names(("base",))
        self.names.join(self)
        self.records: dict[str, AdapterRecord] = {}

    def add(self, id: str) -> None:
        info = AdapterInfo(f"v-{id}", "LORA", ("LowRank",), 8, 4, 1024)
        self.records[id] = AdapterRecord(id, f"v-{id}", "/src", False, 1, info, "ready")

    def unload(self, id: str) -> None:
        del self.records[id]
        for hook in self.on_unloaded:
            hook(id)

    def ids(self) -> list[str]:
        return [*self.records]

    def describe(self, id: str) -> str | None:
        return f"adapter {id!r} exists" if id in self.records else None

    def list(self) -> list[AdapterRecord]:
        return list(self.records.values())


class Server:
    def __init__(self) -> None:
        self.engine, self.adapters = Engine(), Adapters()
        self.metrics = Metrics(self.engine, self.adapters)

    def scrape(self) -> dict[tuple[str, ...], float]:
        """(name, label values in the order of the labels' names) -> value."""
        body, content_type = self.metrics.renderer()()
        assert content_type.startswith("text/plain")
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    def observe(self, adapter: str | None) -> None:
        self.metrics.observe_request(
            adapter, ttft=0.2, itls=[0.01, 0.03], e2e=0.24, prompt_tokens=10, generation_tokens=3,
            finish_reason="stop", queue=0.1,
        )  # fmt: skip


@pytest.fixture
def server() -> Server:
    return Server()


def test_before_the_engine_has_started(server: Server) -> None:
    values = server.scrape()
    assert values["weft_engine_up",] == 0 and values["weft_engine_restarts_total",] == 0
    assert not [key for key in values if key[0].startswith("vllm:")]


def test_gauges_follow_the_newest_snapshot(server: Server) -> None:
    server.engine.start()
    for id in ("a", "b", "idle"):
        server.adapters.add(id)
    stats = EngineStats(
        running=3, waiting=2, blocks_used=32, blocks_total=128, step_adapters=2, max_step_adapters=7,
        adapters={"": AdapterStats(1, 0, 5, 6), "a": AdapterStats(2, 0, 50, 60), "b": AdapterStats(0, 2)},
        tiers={"v-a": "device", "v-b": "loading"}, refcounts={"v-a": 2}, slots_used=1, slots_total=8,
        device_bytes=10, host_bytes=20, device_bytes_total=100,
    )  # fmt: skip
    server.engine.push(replace(stats, running=99))
    server.engine.push(stats)
    values = server.scrape()
    expected = {
        ("weft_engine_up",): 1,
        ("weft_requests_running", "a"): 2,
        ("weft_requests_running", "__base__"): 1,
        ("weft_requests_running", "idle"): 0,
        ("weft_requests_waiting", "b"): 2,
        ("weft_step_adapters",): 2,
        ("weft_step_adapters_max",): 7,
        ("weft_kv_cache_usage_ratio",): 0.25,
        ("weft_adapter_slots_used",): 1,
        ("weft_adapter_slots",): 8,
        ("weft_adapter_tier", "a", "device"): 1,
        ("weft_adapter_tier", "a", "host"): 0,
        ("weft_adapter_tier", "b", "loading"): 1,
        ("weft_adapter_bytes", "a"): 1024,
        ("weft_adapter_references", "a"): 2,
        ("weft_adapter_memory_bytes", "device"): 10,
        ("weft_adapter_memory_bytes", "host"): 20,
        ("weft_prompt_tokens_total", "a"): 50,
        ("weft_generation_tokens_total", "__base__"): 6,
        ("weft_adapter_info", "a", "LORA", "ready", "v-a"): 1,
        ("vllm:num_requests_running",): 3,
        ("vllm:num_requests_waiting",): 2,
        ("vllm:kv_cache_usage_perc",): 0.25,
        ("vllm:cache_config_info", "16", "128"): 1,
    }
    assert {key: values.get(key) for key in expected} == expected


def test_proxy_models_and_their_adapters(server: Server) -> None:
    server.engine.start()
    server.adapters.add("x")
    server.adapters.records["x"] = replace(server.adapters.records["x"], base="small")
    of = ModelStats(
        running=3, blocks_used=5, blocks_total=9, tiers={"v-x": "host"}, refcounts={"v-x": 2}, device_bytes=7
    )
    server.engine.push(EngineStats(tiers={"v-x": "device"}, proxies={"small": of}))
    values = server.scrape()
    expected = {
        ("weft_proxy_streams_running", "small"): 3,
        ("weft_proxy_kv_cache_blocks_used", "small"): 5,
        ("weft_proxy_kv_cache_blocks", "small"): 9,
        ("weft_proxy_adapter_device_bytes", "small"): 7,
        ("weft_adapter_tier", "x", "host"): 1,
        ("weft_adapter_tier", "x", "device"): 0,
        ("weft_adapter_references", "x"): 2,
    }
    assert {key: values[key] for key in expected} == expected


def test_routers_find_one_lora_series_with_the_time(server: Server) -> None:
    server.engine.start()
    adapters = {"": AdapterStats(1, 1), "b": AdapterStats(1, 0), "a": AdapterStats(1, 1), "c": AdapterStats(0, 1)}
    server.engine.push(EngineStats(adapters=adapters))
    server.scrape()
    server.engine.push(EngineStats(adapters={**adapters, "d": AdapterStats(1, 0)}))
    series = {key: value for key, value in server.scrape().items() if key[0] == "vllm:lora_requests_info"}
    assert list(series) == [("vllm:lora_requests_info", "8", "a,b,d", "a,c")]
    assert abs(next(iter(series.values())) - time.time()) < 5
    body = server.metrics.renderer()()[0].decode()
    assert 'vllm:lora_requests_info{max_lora="8",running_lora_adapters="a,b,d",waiting_lora_adapters="a,c"} ' in body


def test_counters_do_not_fall_when_the_engine_starts_again(server: Server) -> None:
    server.adapters.add("a")
    totals: list[tuple[float, ...]] = []

    def note() -> None:
        values = server.scrape()
        totals.append(
            (
                values["weft_steps_total",],
                values["weft_generation_tokens_total", "a"],
                values["weft_generation_tokens_total", "__base__"],
                values["weft_adapter_load_seconds_sum",],
                values["weft_adapter_load_seconds_count",],
            )
        )

    for steps in (10, 4):
        server.engine.start()
        for k in range(1, steps + 1):
            adapters = {"": AdapterStats(generation_tokens=k), "a": AdapterStats(generation_tokens=2 * k)}
            server.engine.push(EngineStats(steps=k, adapters=adapters, loads=1, load_seconds_sum=0.5))
            note()
        server.engine.die()
        note()
    assert totals == sorted(totals)
    assert totals[-1] == (14, 28, 14, 1.0, 2)
    assert server.scrape()["weft_engine_restarts_total",] == 1


def test_requests_are_observed_by_adapter(server: Server) -> None:
    server.adapters.add("a")
    server.observe("a")
    server.observe("a")
    server.observe(None)
    server.metrics.observe_request(
        "a", ttft=None, itls=(), e2e=0.1, prompt_tokens=1, generation_tokens=0, finish_reason="abort"
    )
    values = server.scrape()
    expected = {
        ("weft_requests_total", "a", "stop"): 2,
        ("weft_requests_total", "a", "abort"): 1,
        ("weft_requests_total", "__base__", "stop"): 1,
        ("weft_time_to_first_token_seconds_count", "a"): 2,
        ("weft_time_to_first_token_seconds_bucket", "a", "0.1"): 0,
        ("weft_time_to_first_token_seconds_bucket", "a", "0.25"): 2,
        ("weft_inter_token_latency_seconds_count", "a"): 4,
        ("weft_inter_token_latency_seconds_sum", "a"): 0.08,
        ("weft_request_seconds_count", "a"): 3,
        ("weft_request_queue_seconds_sum", "__base__"): 0.1,
        ("weft_request_prompt_tokens_sum", "a"): 21,
        ("weft_request_generation_tokens_sum", "a"): 6,
    }
    assert {key: pytest.approx(values.get(key)) for key in expected} == expected


def test_an_unloaded_adapter_leaves_no_series(server: Server) -> None:
    server.engine.start()
    server.adapters.add("a")
    server.observe("a")
    server.engine.push(EngineStats(adapters={"a": AdapterStats(generation_tokens=3)}))
    assert [key for key in server.scrape() if "a" in key]
    server.adapters.unload("a")
    assert [key for key in server.scrape() if "a" in key] == []
    server.observe("a")  # too late, or never there: counted, but not under a name of the client's choosing
    values = server.scrape()
    assert [key for key in values if "a" in key] == []
    assert values["weft_requests_total", "__unloaded__", "stop"] == 1


def test_names_are_escaped(server: Server) -> None:
    server.adapters.add('quo"te{x="y"}')
    assert ("weft_adapter_bytes", 'quo"te{x="y"}') in server.scrape()


def test_openmetrics_on_request(server: Server) -> None:
    server.engine.start()
    body, content_type = server.metrics.renderer("application/openmetrics-text; version=1.0.0")()
    assert content_type.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
