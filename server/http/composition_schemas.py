"""The bodies of compositions and of the search for their weights; compositions and jobs as they are shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from weft.adapters.composition import Combination
from weft.adapters.search import SearchSettings
from weft.server.errors import InvalidRequest
from weft.server.http.members import WeighedAdapters
from weft.server.http.messages import Body
from weft.server.jobs import Job
from weft.server.registry.compositions import MAX_MEMBERS, NamedComposition, State

MAX_EXAMPLES = 256
MAX_BUDGET = 1000
MAX_ROUND = 64
MAX_DESCRIPTION = 4096

Id = Annotated[str, Field(min_length=1, max_length=256)]


class CompositionReplace(Body):
    """``PUT /admin/compositions/{id}``."""

    adapters: WeighedAdapters
    combination: Combination = Field("lorahub", description="lorahub: (Σ w B)(Σ w A); linear: Σ w ΔW.")
    description: str | None = Field(None, max_length=MAX_DESCRIPTION)


class CompositionCreate(CompositionReplace):
    """``POST /admin/compositions``."""

    id: Id


class FitExample(Body):
    """An example of the task: a prompt, and the completion wanted after it."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)


class FitBody(Body):
    """``POST /admin/compositions/fit``. The defaults are those of LoRAHub."""

    candidates: Annotated[list[Id], Field(min_length=1, max_length=MAX_MEMBERS, description="Ids of adapters.")]
    examples: Annotated[list[FitExample], Field(min_length=1, max_length=MAX_EXAMPLES)]
    save_as: Id = Field(description="Id of the composition that is made.")
    combination: Combination = "lorahub"
    description: str | None = Field(None, max_length=MAX_DESCRIPTION)
    budget: int = Field(40, ge=1, le=MAX_BUDGET, description="Weightings that are scored.")
    seed: int = Field(42, ge=0, lt=2**32)
    optimizer: str = Field("NGOpt", max_length=32, description="Of nevergrad: NGOpt, Shiwa or CMA.")
    l1: float = Field(0.05, ge=0, le=1000, description="Times the mean size of the weights, beside the loss.")
    round_size: int = Field(1, ge=1, le=MAX_ROUND, description="Weightings scored together, in one mixed batch.")

    @model_validator(mode="after")
    def _check(self) -> FitBody:
        if problem := self.settings().problem():
            raise InvalidRequest(problem[1], param=problem[0])
        for index, id in enumerate(self.candidates):
            if id in self.candidates[:index]:
                raise InvalidRequest(f"'candidates[{index}]': {id[:64]!r} is named twice", param=f"candidates[{index}]")
        return self

    def settings(self) -> SearchSettings:
        return SearchSettings(self.budget, self.seed, self.optimizer, self.l1, self.round_size)


def composed_of(composition: NamedComposition) -> dict[str, Any]:
    """What a composition is made of."""
    members = [{"id": member.id, "weight": member.weight} for member in composition.members]
    return {"adapters": members, "combination": composition.combination}


def composition_card(composition: NamedComposition, state: State) -> dict[str, Any]:
    """A composition as the admin API shows it."""
    return {
        "id": composition.id,
        "object": "composition",
        "base": composition.base,
        **composed_of(composition),
        "description": composition.description,
        "created": composition.created,
        "state": state.state,
        "error": state.error,
        "revision": composition.revision,
        "provenance": composition.provenance,
    }


def job_card(job: Job) -> dict[str, Any]:
    """A job as the admin API shows it: what it is for, how far it is, what became of it."""
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "state": job.state,
        "error": job.error,
        "created": int(job.created),
        "ended": None if job.ended is None else int(job.ended),
        "request": job.about,
        "trials": len(job.events),
        "losses": [event["loss"] for event in job.events],
        "result": job.result,
    }
