"""Prometheus metrics: weft's own, and the few of vLLM's that routers read.

Gauges and counters are read from the engine's newest snapshot at the time of the scrape (``engine_metrics``); the
histograms are observed by the HTTP layer, a call per request. Series are labelled by adapter id, and only ids that are
served have any, so their number is bounded by the adapters, whatever clients send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from weft.server.engine.request import COMPOSED
from weft.server.observability.engine_metrics import AdapterView, EngineCollector, EngineView
from weft.server.registry.records import BASE

UNLOADED = "__unloaded__"
"""Label of requests whose adapter was gone when they ended."""

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class _Families(Collector):
    """Families that were collected already, and those of a registry, whose values have locks of their own."""

    def __init__(self, collected: Sequence[Metric], registry: CollectorRegistry) -> None:
        self._collected = collected
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        yield from self._collected
        yield from self._registry.collect()


class Metrics:
    """All metrics of one server."""

    def __init__(self, client: EngineView, adapters: AdapterView) -> None:
        self._adapters = adapters
        self._engine = EngineCollector(client, adapters)
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "weft_requests", "Requests that ended.", ("adapter", "finish_reason"), registry=self._registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", BETWEEN_TOKENS)
        self._e2e = self._histogram("request_seconds", "From arrival to the last token.", WHOLE)
        self._queue = self._histogram("request_queue_seconds", "From arrival to the first time it ran.", FIRST_TOKEN)
        self._compose = self._histogram("request_compose_seconds", "Weighing a request's adapters.", BETWEEN_TOKENS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        adapters.on_unloaded.append(self.forget)

    def observe_request(
        self,
        adapter: str | None,
        *,
        ttft: float | None,
        itls: Sequence[float],
        e2e: float,
        prompt_tokens: int,
        generation_tokens: int,
        finish_reason: str,
        queue: float | None = None,
        compose: float | None = None,
    ) -> None:
        """A request ended. Call it while the adapter's lease is held.

        Args:
            adapter: the id it names, ``COMPOSED`` where it composes for itself; None: the base.
            ttft: seconds to the first token; None if there was none. queue: to the first time it ran, if known.
            compose: that weighing its adapters took; None if it composes none.
            itls: seconds between tokens. e2e: seconds in all.
            finish_reason: one of a few fixed words.
        """
        label = self._label(adapter)
        self._requests.labels(label, finish_reason).inc()
        for histogram, value in ((self._ttft, ttft), (self._queue, queue), (self._compose, compose)):
            if value is not None:
                histogram.labels(label).observe(value)
        between = self._itl.labels(label)
        for itl in itls:
            between.observe(itl)
        self._e2e.labels(label).observe(e2e)
        self._prompt.labels(label).observe(prompt_tokens)
        self._generation.labels(label).observe(generation_tokens)

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that is gone."""
        for metric in (
            self._requests, self._ttft, self._itl, self._e2e, self._queue, self._compose, self._prompt, self._generation
        ):  # fmt: skip
            metric.remove_by_labels({"adapter": adapter})

    def renderer(self, accept: str = "") -> Callable[[], tuple[bytes, str]]:
        """What makes the exposition and its content type, in the format an ``Accept`` header asks for.

        With hundreds of adapters that takes long enough to hold up streams, so it may be called in another thread. What
        the event loop changes is read here, at once.
        """
        encode, content_type = choose_encoder(accept)
        families = _Families([*self._engine.collect()], self._registry)
        return lambda: (encode(families), content_type)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"weft_{name}", text, ("adapter",), buckets=buckets, registry=self._registry)

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        return adapter if adapter == COMPOSED or self._adapters.names.known(adapter) else UNLOADED
