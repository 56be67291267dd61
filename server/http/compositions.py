"""The admin API: named compositions, and the search for weights as a job."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager
from importlib.util import find_spec
from typing import Annotated, Any
from uuid import uuid4

import structlog
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from weft.adapters.composition import Combination
from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.errors import Conflict, InvalidRequest, RequestError
from weft.server.fitting import Example, FitPlan, Fitting
from weft.server.http.admin import if_match_version
from weft.server.http.auth import BEARER, AdminRoute
from weft.server.http.composition_schemas import (
    CompositionCreate,
    CompositionReplace,
    FitBody,
    composition_card,
    job_card,
)
from weft.server.http.errors import DOCUMENTED
from weft.server.http.members import weighed_ids
from weft.server.http.resolution import Resolved, Wanted, resolved
from weft.server.http.responses import JsonResponse, revised
from weft.server.http.state import ServerState, server_state
from weft.server.registry.compositions import NamedComposition, WeighedId

log = structlog.get_logger(__name__)

PROBE_TOKEN = 1
PROBED = "logit_arithmetic[0]"
"""What the engine calls the only term of a probe."""
MEMBER = re.compile(r"\badapters(\[\d+\])(?:\.id)?")
"""A member of a composition in errors."""


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/admin/compositions",
        route_class=AdminRoute,
        tags=["compositions"],
        responses=DOCUMENTED,
        dependencies=[BEARER],
    )
    routes.add_api_route("/fit", fit, methods=["POST"], status_code=202)
    routes.add_api_route("", create, methods=["POST"], status_code=201)
    routes.add_api_route("", list_compositions, methods=["GET"])
    routes.add_api_route("/{id}", show, methods=["GET"])
    routes.add_api_route("/{id}", replace, methods=["PUT"])
    routes.add_api_route("/{id}", delete, methods=["DELETE"])
    return routes


async def create(request: Request, body: CompositionCreate) -> Response:
    """Name a composition of adapters. Answers once it can be requested."""
    state = server_state(request)
    members = weighed_ids(body.adapters)
    state.registry.names.check_free(body.id)
    await _check_composable(state, members, body.combination)
    made = await state.compositions.create(body.id, members, body.combination, description=body.description)
    log.info("admin.compose", composition=made.id, members=[member.id for member in members])
    return revised(_card(state, made), status=201)


async def list_compositions(request: Request) -> Response:
    """All named compositions."""
    state = server_state(request)
    return JsonResponse({"object": "list", "data": [_card(state, one) for one in state.compositions.list()]})


async def show(request: Request, id: str) -> Response:
    """One composition; its revision is the reply's ``ETag``."""
    state = server_state(request)
    return revised(_card(state, state.compositions.get(id)))


async def replace(
    request: Request, id: str, body: CompositionReplace, if_match: Annotated[str | None, Header()] = None
) -> Response:
    """Have an id mean another composition. Requests under way finish on the one they started with."""
    state = server_state(request)
    members = weighed_ids(body.adapters)
    state.compositions.check_replacement(state.compositions.get(id), members)
    await _check_composable(state, members, body.combination)
    made = await state.compositions.replace(
        id, members, body.combination, description=body.description, if_match=if_match_version(if_match)
    )
    log.info("admin.recompose", composition=made.id, members=[member.id for member in members])
    return revised(_card(state, made))


async def delete(request: Request, id: str) -> Response:
    """Forget a composition; requests under way finish, and its members stay."""
    await server_state(request).compositions.delete(id)
    log.info("admin.decompose", composition=id)
    return JsonResponse({"id": id, "object": "composition", "deleted": True})


async def fit(request: Request, body: FitBody) -> Response:
    """Search for the weights of adapters that do best on a few examples (LoRAHub), and name what is found.

    Answers at once with a job; its events tell of every weighting that was tried.
    """
    state = server_state(request)
    if find_spec("nevergrad") is None:
        raise Conflict("the search needs nevergrad: pip install 'weft[fit]' on the server", code="fit_not_installed")
    state.registry.names.check_free(body.save_as)
    members = tuple(WeighedId(id, 0.0) for id in body.candidates)
    with _candidates():
        if (base := state.compositions.model_of(members)) is not None:
            raise InvalidRequest(
                f"'candidates' belong to the proxy model {base!r}, and the search scores what the base answers with "
                "them; name a composition with weights of your own",
                param="candidates",
                code="wrong_base",
            )
        await _check_composable(state, members, body.combination)
    examples = await state.workers.run(_examples, state, body)
    with ExitStack() as held:
        with _candidates():
            state.compositions.check_members(members)
        records = [held.enter_context(state.registry.lease(id)) for id in body.candidates]
        held.enter_context(state.compositions.reserved(body.save_as, "a search for weights"))
        versions = tuple(record.version for record in records)
        plan = FitPlan(
            tuple(body.candidates),
            versions,
            examples,
            body.combination,
            body.settings(),
            body.save_as,
            body.description,
        )
        fitting = Fitting(state.client, state.compositions, plan)
        own = held.pop_all()
        try:
            job = state.jobs.start("fit", plan.about, fitting.run, own)
        except RequestError:
            own.close()
            raise
    log.info("admin.fit", job=job.id, candidates=body.candidates, save_as=body.save_as)
    return JsonResponse(job_card(job), status_code=202, headers={"Location": f"/admin/jobs/{job.id}"})


def _examples(state: ServerState, body: FitBody) -> tuple[Example, ...]:
    """The examples as token ids: a prompt as /v1/completions reads it, and its completion up to the end of sequence."""
    tokenizer, limit = state.tokenizer, state.client.info.max_model_len
    end = state.client.info.eos_token_ids[:1]
    examples = []
    for index, example in enumerate(body.examples):
        at = f"examples[{index}]"
        prompt = tokenizer.encode(example.prompt, add_special_tokens=True, param=f"{at}.prompt")
        completion = tokenizer.encode(example.completion, add_special_tokens=False, param=f"{at}.completion")
        if not prompt or not completion:
            param = f"{at}.{'completion' if prompt else 'prompt'}"
            raise InvalidRequest(f"'{param}' has no tokens", param=param)
        if len(prompt) + len(completion) + len(end) >= limit:
            raise InvalidRequest(
                f"'{at}' has {len(prompt) + len(completion)} tokens; this model's context is {limit}", param=at
            )
        examples.append(Example(tuple(prompt), (*completion, *end)))
    return tuple(examples)


async def _check_composable(state: ServerState, members: tuple[WeighedId, ...], combination: Combination) -> None:
    """Have the engine compose ``members`` for their model, as a request would, and so refuse what it would refuse.

    Raises:
        RequestError: naming the field.
    """
    base = state.compositions.model_of(members)
    with resolved(state, Wanted(base or state.base_name, members, combination, base=base)) as runs:
        probe = _probe(runs, base)
        try:
            async with aclosing(state.client.generate(probe, ids=runs.ids)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason == "error":
                        raise InvalidRequest(delta.error or "these adapters cannot be composed", param="adapters")
        except InvalidRequest as error:
            param = (error.param or "").removeprefix(PROBED).removeprefix(".") or "adapters"
            raise InvalidRequest(error.message.removeprefix(f"{PROBED}: "), param=param, code=error.code) from None


@contextmanager
def _candidates() -> Iterator[None]:
    """What is wrong with the members of a composition, as what is wrong with the candidates of a search."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = "candidates" if error.param == "adapters" else MEMBER.sub(r"candidates\1", error.param)
        error.message = MEMBER.sub(r"candidates\1", error.message)
        raise


def _probe(runs: Resolved, base: str | None) -> EngineRequest:
    """A request for one token of a composition: of a proxy model's it is the one term that counts."""
    plain = EngineRequest(f"probe-{uuid4().hex}", [PROBE_TOKEN], SamplingParams(max_tokens=1, temperature=0.0))
    if base is None:
        return dataclasses.replace(plain, adapter_name=runs.name, composition=runs.composition)
    term = Term(1.0, base, None, runs.name, runs.composition)
    return dataclasses.replace(plain, arithmetic=LogitArithmetic((term,), weight=0.0))


def _card(state: ServerState, composition: NamedComposition) -> dict[str, Any]:
    return composition_card(composition, state.compositions.state(composition))
