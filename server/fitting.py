"""LoRAHub's search for weights on a running server: candidates scored by its engine, beside everybody's requests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from weft.adapters.composition import Combination, Composition, Member
from weft.adapters.search import SearchError, SearchSettings, Trial, Weights, WeightSearch, penalty
from weft.server.engine.request import COMPOSED, EngineRequest, SamplingParams
from weft.server.errors import Conflict, EngineUnavailable, NotFound, Overloaded
from weft.server.jobs import Job
from weft.server.registry.compositions import Compositions, NamedComposition, WeighedId
from weft.server.runtime.client import EngineClient

PRIORITY = 1 << 20
"""Of the requests that score: higher than any that people are likely to give, so they come last."""
MAX_RETRIES = 600
"""Seconds, about, that a request which scores waits for a place in the engine's queue."""


@dataclass(frozen=True)
class Example:
    """One example: token ids of the prompt, and of the completion that is wanted after it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class FitPlan:
    """What a search is for.

    Attributes:
        ids, versions: of the candidates, in one order.
        save_as: id of the composition that it makes.
    """

    ids: tuple[str, ...]
    versions: tuple[str, ...]
    examples: tuple[Example, ...]
    combination: Combination
    settings: SearchSettings
    save_as: str
    description: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """For those who look at the job."""
        candidates = [{"id": id, "version": v} for id, v in zip(self.ids, self.versions, strict=True)]
        return {"candidates": candidates, "combination": self.combination, **self.provenance}

    @property
    def provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256(msgspec.json.encode([(e.prompt, e.completion) for e in self.examples])).hexdigest()
        examples = {"count": len(self.examples), "digest": digest}
        return {**asdict(self.settings), "examples": examples, "save_as": self.save_as}


class Fitting:
    """Runs one plan. The caller holds the candidates' versions, and the id of what is made, until it is over."""

    def __init__(self, client: EngineClient, compositions: Compositions, plan: FitPlan) -> None:
        self._client = client
        self._compositions = compositions
        self._plan = plan
        self._numbers = 0
        # As many as the engine takes into one batch; the rest would only fill its queue.
        self._places = asyncio.Semaphore(client.info.max_num_seqs)

    async def run(self, job: Job) -> dict[str, Any]:
        """The search, then the composition it found. Raises ``RequestError``."""
        plan = self._plan
        try:
            search = await asyncio.to_thread(WeightSearch, len(plan.ids), plan.settings)
            try:
                best = await self._search(search, job)
            finally:
                await asyncio.shield(asyncio.to_thread(search.close))
        except SearchError as error:
            raise Conflict(str(error), code="search_failed") from None
        members = tuple(WeighedId(id, w) for id, w in zip(plan.ids, best.weights, strict=True))
        provenance = {
            **plan.about,
            "job": job.id,
            "loss": best.loss,
            "losses": [round(trial.loss, 6) for trial in search.trials],
        }
        made = NamedComposition(plan.save_as, members, plan.combination, int(time.time()), plan.description, provenance)
        await self._compositions.put_reserved(made)
        return {"composition": plan.save_as, **_shown(plan.ids, best)}

    async def _search(self, search: WeightSearch, job: Job) -> Trial:
        """The recommendation, and how it scores."""
        best: Trial | None = None
        while candidates := await asyncio.to_thread(search.ask):
            trials = await asyncio.to_thread(search.tell, await self._losses(job.id, candidates))
            best = min([*trials, *([best] if best else [])], key=lambda trial: trial.score)
            for trial in trials:
                job.tell({"type": "trial", "budget": self._plan.settings.budget, **_shown(self._plan.ids, trial)})
        weights = await asyncio.to_thread(search.recommendation)
        for trial in search.trials:
            if trial.weights == weights:
                return trial
        [loss] = await self._losses(job.id, [weights])
        return Trial(weights, loss, loss + penalty(weights, self._plan.settings.l1))

    async def _losses(self, job_id: str, candidates: Sequence[Weights]) -> list[float]:
        """Of every candidate the mean over the examples; all of them are in the engine at once."""
        self._check_served()
        tasks = [
            asyncio.create_task(self._loss(job_id, self._composition(weights), example))
            for weights in candidates
            for example in self._plan.examples
        ]
        try:
            losses = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        count = len(self._plan.examples)
        return [sum(losses[at : at + count]) / count for at in range(0, len(losses), count)]

    async def _loss(self, job_id: str, composition: Composition, example: Example) -> float:
        """Mean cross entropy of the completion's tokens given the prompt, as LoRAHub has it with batches of one."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        tokens = [*example.prompt, *example.completion]
        async with self._places:
            for _ in range(MAX_RETRIES):
                self._numbers += 1
                request = EngineRequest(
                    f"{job_id}-{self._numbers}", tokens, params, None, COMPOSED, priority=PRIORITY,
                    composition=composition,
                )  # fmt: skip
                try:
                    return -sum(await self._logprobs(request, len(example.completion))) / len(example.completion)
                except Overloaded as error:
                    await asyncio.sleep(error.retry_after)
        raise Overloaded("the engine had no place for the requests that score")

    async def _logprobs(self, request: EngineRequest, last: int) -> list[float]:
        """Of the ``last`` tokens of a request's prompt."""
        entries = None
        async with aclosing(self._client.generate(request, ids=self._plan.ids)) as deltas:
            async for delta in deltas:
                if delta.finish_reason in ("abort", "error"):
                    raise EngineUnavailable(delta.error or "a request that scores was aborted")
                entries = delta.prompt_logprobs or entries
        if entries is None:
            raise EngineUnavailable("the engine gave no log-probabilities")
        return [entry.logprob for entry in entries[-last:] if entry is not None]

    def _composition(self, weights: Weights) -> Composition:
        members = (Member(version, weight) for version, weight in zip(self._plan.versions, weights, strict=True))
        return Composition(tuple(members), self._plan.combination)

    def _check_served(self) -> None:
        """Raises ``Conflict`` where a candidate is being unloaded, which waits for the search to let go of it."""
        for id in self._plan.ids:
            try:
                served = self._compositions.registry.get(id).state == "ready"
            except NotFound:
                served = False
            if not served:
                raise Conflict(f"candidate {id!r} was unloaded while its weight was searched", code="adapter_unloaded")


def _shown(ids: Sequence[str], trial: Trial) -> dict[str, Any]:
    adapters = [{"id": id, "weight": weight} for id, weight in zip(ids, trial.weights, strict=True)]
    return {"adapters": adapters, "loss": trial.loss, "score": trial.score}
