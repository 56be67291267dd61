"""Times on the device: medians of CUDA events around graph replays, with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Times what is enqueued, without the host's share: a graph is replayed while the cache is still being flushed.

    On a CPU, where there is only a smoke test, wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * max(size, 32 << 20), dtype=torch.int8, device=device)

    def median(self, run: Callable[[], object], repeats: int = 15) -> float:
        """Seconds that ``run`` takes on the device; it must not wait for the device."""
        if self._flush is None:
            return statistics.median(_wall(run) for _ in range(min(repeats, 3)))
        replay = captured(run)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            self._flush.zero_()
            start.record()
            replay()
            stop.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large copy on the device: what kernels are measured against."""
        size = 1 << (30 if self._flush is not None else 22)
        source = torch.ones(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.median(lambda: target.copy_(source))


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A graph of what ``run`` enqueues, after it ran three times so that its kernels are compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _wall(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
