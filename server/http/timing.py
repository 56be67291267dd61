"""When the tokens of a request came, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from weft.server.observability.metrics import Metrics


class Times:
    """Of one request; ``arrived`` is from ``time.perf_counter``."""

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.first: float | None = None
        self.gaps: list[float] = []
        self.tokens = 0
        self.queue: float | None = None  # seconds, from the engine
        self.compose: float | None = None  # likewise
        self.finish_reason: str | None = None
        self._last = 0.0

    def mark(self, tokens: int, finish_reason: str | None) -> None:
        """``tokens`` have just come."""
        self.finish_reason = finish_reason
        if tokens:
            now = time.perf_counter()
            if self.first is None:
                self.first = now
            else:
                self.gaps.append(now - self._last)
            self._last = now
            self.tokens += tokens


@contextmanager
def observed(metrics: Metrics, adapter: str | None, prompt_tokens: int, arrived: float) -> Iterator[Times]:
    """Times to mark; what they are at the end goes to the metrics, however the request ends."""
    times = Times(arrived)
    try:
        yield times
    except Exception:
        times.finish_reason = "error"
        raise
    finally:
        metrics.observe_request(
            adapter,
            ttft=None if times.first is None else times.first - arrived,
            itls=times.gaps,
            e2e=time.perf_counter() - arrived,
            prompt_tokens=prompt_tokens,
            generation_tokens=times.tokens,
            queue=times.queue,
            compose=times.compose,
            finish_reason=times.finish_reason or "abort",  # the client left: no error, and no end
        )
