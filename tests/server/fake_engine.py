"""An engine without a model, obeying the contract of ``weft.server.engine.engine.Engine``.

Its k-th token for a request is a function of the prompt, the adapter's version and k, so a test knows what to expect.
A prompt that starts with ``CRASH`` makes ``step`` raise, with ``UNEXPECTED`` makes ``add`` raise, with ``STUCK`` never
gets a token. ``config.model`` chooses how loading the model goes, ``adapter_config.json`` how an adapter is taken.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine.info import AdapterInfo, AdapterStats, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.errors import InvalidRequest, NotFound, Overloaded

CRASH = 666
UNEXPECTED = 667
STUCK = 668
VOCAB = 1000
STEP_SECONDS = 0.002


def expected_tokens(prompt: list[int], version: str | None, count: int) -> list[int]:
    seed = sum(prompt) + (int(version[:8], 16) if version else 0)
    return [(seed + 7 * k) % VOCAB for k in range(count)]


class FakeAdapters:
    """Like the real one, it forgets what was unregistered only when polled."""

    def __init__(self) -> None:
        self.infos: dict[str, AdapterInfo] = {}
        self.doomed: set[str] = set()
        self.pinned: set[str] = set()

    @property
    def idle(self) -> bool:
        return not self.doomed

    def poll(self) -> None:
        for version in self.doomed:
            self.infos.pop(version, None)
        self.doomed.clear()

    def register(self, version: str, folder: Path) -> AdapterInfo:
        if not folder.is_dir():
            raise AdapterFormatError(f"no such folder: {folder}", param="folder")
        config = json.loads((folder / "adapter_config.json").read_text())
        time.sleep(config.get("seconds", 0.0))
        if config.get("refuse"):
            raise AdapterMismatch("lora_A has the wrong shape", param="lora_A.weight")
        if config.get("explode"):
            raise ZeroDivisionError("a bug")
        self.infos[version] = AdapterInfo(version, "LORA", ("LowRank",), config["r"], 4, 1024)
        return self.infos[version]

    def unregister(self, version: str) -> None:
        self.doomed.add(version)


class FakeEngine:
    def __init__(self, config: EngineConfig, *, progress: Callable[[str], None] | None = None) -> None:
        if progress:
            progress("reading the configuration")
            progress("loading weights")
        if config.model == "missing":
            raise ConfigError("model 'missing' is not a folder and not on the hub; check --model")
        if config.model == "exits":
            os._exit(9)
        if config.model == "raises":
            raise OSError("disk on fire")
        if config.model == "eternal":
            time.sleep(600)
        if config.model.startswith("once:") and Path(config.model[5:]).exists():
            raise ConfigError("no second start")
        if config.model.startswith("once:"):
            Path(config.model[5:]).touch()
        self.config = config
        self.adapters = FakeAdapters()
        self.info = ModelInfo(
            config.model, "fake", "FakeForCausalLM", "f" * 64, "float32", "cpu", VOCAB, 4096, (0,), 1, 100, 16,
            config.max_num_seqs, config.max_adapters, 0.1,
        )  # fmt: skip
        self.live: dict[str, tuple[EngineRequest, list[int]]] = {}
        self.ended: deque[TokenDelta] = deque()
        self.steps = 0
        self.polls = 0
        self.generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.ended)

    @property
    def settled(self) -> bool:
        return self.adapters.idle

    def add(self, request: EngineRequest) -> None:
        if request.prompt_token_ids[0] == UNEXPECTED:
            raise ZeroDivisionError("a bug in add")
        if len(self.live) >= self.config.max_queued_requests:
            raise Overloaded("too many requests are waiting", retry_after=7)
        known = self.adapters.infos.keys() - self.adapters.doomed
        if request.adapter is not None and request.adapter not in known:
            raise NotFound(f"adapter version {request.adapter} is not registered", param="model")
        if max(request.prompt_token_ids) >= VOCAB:
            raise InvalidRequest("a token id is beyond the vocabulary", param="prompt")
        self.live[request.request_id] = (request, [])

    def abort(self, request_id: str) -> None:
        if self.live.pop(request_id, None):
            self.ended.append(TokenDelta(request_id, finish_reason="abort"))

    def register_adapter(self, version: str, folder: Path, model: str | None = None) -> AdapterInfo:
        return self.adapters.register(version, folder)

    def unregister_adapter(self, version: str, model: str | None = None) -> None:
        self.adapters.unregister(version)

    def pin_adapters(self, versions: Iterable[str], model: str | None = None) -> None:
        self.adapters.pinned = set(versions)

    def poll(self) -> None:
        self.adapters.poll()

    def step(self) -> list[TokenDelta]:
        self.polls += 1
        self.adapters.poll()
        deltas = list(self.ended)
        self.ended.clear()
        running = [(r, out) for r, out in self.live.values() if r.prompt_token_ids[0] != STUCK]
        if not running:
            return deltas
        time.sleep(STEP_SECONDS)
        self.steps += 1
        for request, out in running:
            if request.prompt_token_ids[0] == CRASH and len(out) == 3:
                raise RuntimeError("an illegal memory access was encountered")
            limit = request.params.max_tokens or 1
            out.append(expected_tokens(request.prompt_token_ids, request.adapter, len(out) + 1)[-1])
            done = len(out) >= limit
            self.generated += 1
            deltas.append(TokenDelta(request.request_id, [out[-1]], finish_reason="length" if done else None))
            if done:
                del self.live[request.request_id]
        return deltas

    def stats(self) -> EngineStats:
        by_name: dict[str, AdapterStats] = {"": AdapterStats(generation_tokens=self.generated)}
        for request, _ in self.live.values():
            name = request.adapter_name or ""
            before = by_name.get(name, AdapterStats())
            by_name[name] = AdapterStats(before.running + 1, 0, before.prompt_tokens, before.generation_tokens)
        return EngineStats(
            running=len(self.live),
            steps=self.steps,
            batch_tokens=self.polls,
            adapters=by_name,
            tiers=dict.fromkeys(self.adapters.infos, "host"),
        )


def build(config: EngineConfig, *, progress: Callable[[str], None] | None = None) -> FakeEngine:
    return FakeEngine(config, progress=progress)
