"""A workload run on the engine in this process: no server, no HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.adapters.store import digest
from weft.server.bench.measure import StepAdapters, Trace, clock
from weft.server.bench.workload import Arrival
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.errors import RequestError


class OfflineTarget:
    """An engine and its adapters, by name; the base goes by ``base``.

    Raises:
        ConfigError, AdapterError: the model, or an adapter, cannot be served.
    """

    def __init__(self, config: EngineConfig, adapters: Mapping[str, Path], *, base: str = "base") -> None:
        self.engine = Engine(config)
        self.base = base
        self.adapters = list(adapters)
        self._versions: dict[str, str] = {}
        for name, folder in adapters.items():
            self._versions[name] = digest(folder)
            self.engine.register_adapter(self._versions[name], folder)

    @property
    def about(self) -> dict[str, Any]:
        """The model and where it runs."""
        info = self.engine.info
        return {
            "mode": "offline",
            "model": Path(info.model).name,
            "architecture": info.architecture,
            "parameters": info.num_parameters,
            "dtype": info.dtype,
            "device": info.device,
            "max_num_seqs": info.max_num_seqs,
        }

    def close(self) -> None:
        """Stop the engine's background work."""
        self.engine.close()

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> tuple[list[Trace], StepAdapters]:
        """Run ``arrivals`` to their end: ``concurrency`` at a time, or each at its own time if that is None."""
        now = clock()
        waiting, running = deque(arrivals), dict[str, Trace]()
        traces: list[Trace] = []
        distinct: list[int] = []
        steps = 0
        while waiting or running:
            while waiting and (waiting[0].time <= now() if concurrency is None else len(running) < concurrency):
                arrival = waiting.popleft()
                trace = Trace(arrival.model, now() if concurrency else arrival.time, len(arrival.prompt))
                traces.append(trace)
                self._add(str(len(traces)), arrival, trace, running)
            if not self.engine.has_work:
                if waiting and concurrency is None:
                    time.sleep(max(0.0, waiting[0].time - now()))
                continue
            deltas = self.engine.step()
            for delta in deltas:
                running[delta.request_id].record(now(), len(delta.token_ids))
                if delta.finish_reason is not None:
                    running.pop(delta.request_id).error = delta.error
            if self.engine.steps != steps:
                distinct.append(self.engine.step_adapters)
            elif not deltas:
                self.engine.wait(0.01)
            steps = self.engine.steps
        return traces, StepAdapters(sum(distinct) / max(1, len(distinct)), max(distinct, default=0))

    def _add(self, request_id: str, arrival: Arrival, trace: Trace, running: dict[str, Trace]) -> None:
        params = SamplingParams(max_tokens=arrival.max_tokens, temperature=0.0, ignore_eos=True)
        name = None if arrival.model == self.base else arrival.model
        version = None if name is None else self._versions[name]
        request = EngineRequest(request_id, arrival.prompt, params, adapter=version, adapter_name=name)
        try:
            self.engine.add(request)
        except RequestError as refusal:
            trace.error = refusal.message
        else:
            running[request_id] = trace
