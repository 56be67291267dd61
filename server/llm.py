"""Offline generation: the same engine, no server. ``from weft.server import LLM, SamplingParams``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.adapters.composition import Combination, Composition, Member
from weft.adapters.store import digest
from weft.server.config import EngineConfig
from weft.server.engine.arithmetic import LogitArithmetic
from weft.server.engine.engine import Engine
from weft.server.engine.info import AdapterInfo, ModelInfo
from weft.server.engine.request import EngineRequest, SamplingParams, TokenLogprobs
from weft.server.errors import InvalidRequest, NotFound
from weft.server.offline import Completion, Generation, Stream
from weft.server.tokenization import Tokenizer

Prompt = str | list[int]

Adapter = str | Mapping[str, float]
"""Id of an adapter, or weights of several by id, which are composed."""


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one prompt; ``outputs`` has ``n`` entries."""

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    adapter: Adapter | None
    outputs: list[Completion]


class LLM:
    """A base model and its adapters, in this process.

    Args:
        model: local folder or hub id of a Hugging Face causal LM.
        adapters: folders of adapters as ``peft`` or AdapterHub saved them, by the id they go under.
        proxy_models: folders or hub ids of further frozen models, by name, for logit arithmetic.
        proxy_adapters: the adapters of each of them, likewise.
        settings: fields of ``EngineConfig``, e.g. ``dtype="float32"``, ``max_num_seqs=32``.

    Raises:
        ConfigError: the model or a setting cannot be honoured.
        AdapterError: an adapter cannot be served, and why.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        proxy_models: Mapping[str, str | Path] | None = None,
        proxy_adapters: Mapping[str, Mapping[str, str | Path]] | None = None,
        **settings: Any,
    ) -> None:
        further = tuple((name, str(path)) for name, path in (proxy_models or {}).items())
        # All prompts of a call are queued at once, and the caller waits: there is nobody to turn away.
        config = EngineConfig(
            model=str(model), proxy_models=further, **{"max_queued_requests": sys.maxsize, **settings}
        )
        self.engine = Engine(config)
        self.tokenizer = Tokenizer.load(config.model, trust_remote_code=config.trust_remote_code)
        self._versions: dict[str | None, dict[str, str]] = {name: {} for name in self.engine.models}
        self._serial = 0
        for name, source in (adapters or {}).items():
            self.load_adapter(name, source)
        for proxy_name, sources in (proxy_adapters or {}).items():
            for name, source in sources.items():
                self.load_adapter(name, source, model=proxy_name)

    @property
    def info(self) -> ModelInfo:
        """What is being served."""
        return self.engine.info

    def load_adapter(self, name: str, source: str | Path, *, model: str | None = None) -> AdapterInfo:
        """Load an adapter, or put another one in the place of ``name``.

        Args:
            model: name of the further model it is for; None: the main one.

        Raises:
            AdapterError: it cannot be served, and why. NotFound: there is no such model.
        """
        folder = Path(source)
        version = digest(folder)
        info = self.engine.register_adapter(version, folder, model)
        old = self._versions[model].get(name)
        self._versions[model][name] = version
        if old is not None:
            self._forget(old, model)
        return info

    def unload_adapter(self, name: str, *, model: str | None = None) -> None:
        """Forget an adapter and free its memory.

        Raises:
            NotFound: there is none of that name.
        """
        version = self._version(name, model)
        del self._versions[model][name]
        self._forget(version, model)

    def _forget(self, version: str, model: str | None) -> None:
        if version not in self._versions[model].values():
            self.engine.unregister_adapter(version, model)
            self.engine.poll()

    def _version(self, name: str, model: str | None = None) -> str:
        """The version that an adapter's id stands for."""
        if name not in self._versions.get(model, {}):
            of = "" if model is None else f" of the model {model!r}"
            raise NotFound(f"there is no adapter {name!r}{of}", param="adapter")
        return self._versions[model][name]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: Adapter | Sequence[Adapter | None] | None = None,
        combination: Combination | Sequence[Combination] = "lorahub",
        task_id: int | Sequence[int | None] | None = None,
        lora_rank: int | Sequence[int | None] | None = None,
        arithmetic: LogitArithmetic | Sequence[LogitArithmetic | None] | None = None,
        n: int = 1,
    ) -> list[RequestOutput]:
        """Generate for all prompts together, in mixed batches.

        Args:
            prompts: texts or lists of token ids.
            params: for all prompts, or one per prompt.
            adapter: id of the adapter for all prompts, or one per prompt; None: the base. Weights by id
                (``{"sql": 0.7, "formal": -0.2}``) are a composition of these adapters.
            combination: how compositions are made, for all prompts or one per prompt: ``"lorahub"``, (Σ w B)(Σ w A), or
                ``"linear"``, Σ w ΔW.
            task_id, lora_rank: likewise, for adapters that let requests choose (``AdapterInfo.choices``).
            arithmetic: likewise; its terms name adapters by id (see ``arithmetic.proxy`` for proxy-tuning).
            n: continuations per prompt; with a seed, the i-th uses ``seed + i``.

        Raises:
            RequestError: a prompt or parameter is not acceptable; nothing is generated then.
        """
        batch = _as_list(prompts)
        all_params = _one_each("params", params or SamplingParams(), len(batch))
        names = _one_each("adapter", adapter, len(batch))
        combinations = _one_each("combination", combination, len(batch))
        choices = _choices(len(batch), task_id=task_id, lora_rank=lora_rank)
        sums = _one_each("arithmetic", arithmetic, len(batch))
        ids = [self._encode(prompt) for prompt in batch]
        work = Generation(self.engine, self.tokenizer)
        try:
            for prompt_ids, prompt_params, name, how, chosen, each in zip(
                ids, all_params, names, combinations, choices, sums, strict=True
            ):
                runs = self._runs(name, how) | self._sum(each)
                for index in range(n):
                    work.add(self._request(prompt_ids, prompt_params, runs, chosen, index))
            streams = work.run()
        except BaseException:
            work.abandon()
            raise
        groups = [streams[i : i + n] for i in range(0, len(streams), n)]
        return [_output(prompt, name, group) for prompt, name, group in zip(batch, names, groups, strict=True)]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer; give token ids", param="prompt")
        return self.tokenizer.encode(prompt)

    def _runs(self, name: Adapter | None, combination: Combination) -> dict[str, Any]:
        """The fields of a request that say what it runs with."""
        if name is None:
            return {}
        if isinstance(name, str):
            return {"adapter": self._version(name), "adapter_name": name}
        members = tuple(Member(self._version(each), weight) for each, weight in name.items())
        return {"composition": Composition(members, combination)}

    def _sum(self, arithmetic: LogitArithmetic | None) -> dict[str, Any]:
        """The same with the versions that its adapters' ids stand for, as a field of a request."""
        if arithmetic is None:
            return {}
        terms = []
        for term in arithmetic.terms:
            if term.composition is not None:
                members = (replace(m, version=self._version(m.version, term.model)) for m in term.composition.members)
                term = replace(term, composition=replace(term.composition, members=tuple(members)))
            if term.adapter is not None:
                term = replace(term, adapter=self._version(term.adapter, term.model), adapter_name=term.adapter)
            terms.append(term)
        return {"arithmetic": replace(arithmetic, terms=tuple(terms))}

    def _request(
        self, ids: list[int], params: SamplingParams, runs: dict[str, Any], choices: dict[str, int], index: int
    ) -> EngineRequest:
        if params.seed is not None and index:
            params = replace(params, seed=params.seed + index)
        self._serial += 1
        return EngineRequest(f"offline-{self._serial}", ids, params, choices=choices, **runs)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """``value`` for each of ``count`` prompts, or its own entries."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"'{name}' has {len(value)} entries for {count} prompts", param=name)
    return list(value)


def _choices(count: int, **given: Any) -> list[dict[str, int]]:
    """What each of ``count`` prompts chooses of its adapter, by name."""
    values = {name: _one_each(name, value, count) for name, value in given.items()}
    return [{name: each[i] for name, each in values.items() if each[i] is not None} for i in range(count)]


def _output(prompt: Prompt, adapter: Adapter | None, group: list[Stream]) -> RequestOutput:
    first = group[0]
    completions = [stream.completion(index) for index, stream in enumerate(group)]
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(text, first.request.prompt_token_ids, first.prompt_logprobs, adapter, completions)
