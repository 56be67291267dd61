"""weft through its offline engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers.worker import Request, Setup, Trace, drive, serve
from weft.adapters.store import digest
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams


class Weft:
    """The engine of ``weft.server.LLM``, with slots for just these adapters, as the peers have it."""

    def __init__(self, setup: Setup) -> None:
        settings: dict[str, Any] = {"max_num_seqs": setup.max_num_seqs, "max_adapters": max(1, len(setup.adapters))}
        limits = {"dtype": setup.dtype, "max_model_len": setup.max_model_len}
        self._engine = Engine(EngineConfig(setup.model, device="cpu", **limits, **settings))
        self._versions = {name: digest(Path(folder)) for name, folder in setup.adapters.items()}
        for name, folder in setup.adapters.items():
            self._engine.register_adapter(self._versions[name], Path(folder))
        self._serial = 0
        self._steps = 0
        self._index: dict[str, int] = {}
        self.about = {"versions": {}, "settings": settings}

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        return drive(self, requests, concurrency)

    def add(self, index: int, request: Request) -> None:
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)
        self._serial += 1
        name = str(self._serial)
        self._index[name] = index
        version = None if request.model is None else self._versions[request.model]
        self._engine.add(EngineRequest(name, request.prompt, params, adapter=version, adapter_name=request.model))

    def step(self) -> Iterator[tuple[int, Sequence[int], bool]]:
        deltas = self._engine.step()
        if not deltas and self._engine.stats().steps == self._steps:  # an adapter is on its way
            self._engine.wait(0.01)
        self._steps = self._engine.stats().steps
        for delta in deltas:
            if delta.error is not None:
                raise RuntimeError(delta.error)
            ended = delta.finish_reason is not None
            index = self._index.pop(delta.request_id) if ended else self._index[delta.request_id]
            yield index, delta.token_ids, ended


if __name__ == "__main__":
    serve(Weft)
