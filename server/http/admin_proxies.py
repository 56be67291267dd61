"""The admin API of named proxies."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import structlog
from fastapi import APIRouter, Request
from starlette.responses import Response

from weft.server.errors import Conflict
from weft.server.http.admin_schemas import ProxyCreate
from weft.server.http.arithmetic import steered_by, steering
from weft.server.http.auth import BEARER, AdminRoute
from weft.server.http.errors import DOCUMENTED
from weft.server.http.resolution import Wanted, leased
from weft.server.http.responses import JsonResponse
from weft.server.http.state import ServerState, server_state
from weft.server.registry.proxies import NamedProxy, Stream
from weft.server.tokenization import Tokenizer

log = structlog.get_logger(__name__)


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/admin/proxies", route_class=AdminRoute, tags=["admin"], responses=DOCUMENTED, dependencies=[BEARER]
    )
    routes.add_api_route("", create, methods=["POST"], status_code=201)
    routes.add_api_route("", list_proxies, methods=["GET"])
    routes.add_api_route("/{id}", show, methods=["GET"])
    routes.add_api_route("/{id}", delete, methods=["DELETE"])
    return routes


async def create(request: Request, body: ProxyCreate) -> Response:
    """Name a proxy. Requests use it as their ``model``; its members must be served."""
    state = server_state(request)
    state.registry.names.check_free(body.id)
    asked = body.asked(field="")
    with ExitStack() as held:
        own = leased(state, Wanted(body.base or state.base_name, at="base"), held)
        steering(state, asked, own, {}, _any_messages, held)
    expert, anti_expert = (term.stream for term in asked.terms)
    proxy = NamedProxy(
        body.id, int(time.time()), expert, anti_expert, body.base, asked.terms[0].weight, body.base_top_p
    )
    await state.proxies.create(proxy)
    log.info("admin.proxy_created", proxy=proxy.id)
    return JsonResponse(_card(state, proxy), status_code=201)


async def list_proxies(request: Request) -> Response:
    """All named proxies."""
    state = server_state(request)
    return JsonResponse({"object": "list", "data": [_card(state, proxy) for proxy in state.proxies.list()]})


async def show(request: Request, id: str) -> Response:
    """One named proxy, and whether it can be served now."""
    state = server_state(request)
    return JsonResponse(_card(state, state.proxies.get(id)))


async def delete(request: Request, id: str) -> Response:
    """Forget a named proxy. Requests under way finish; its members stay."""
    await server_state(request).proxies.delete(id)
    log.info("admin.proxy_deleted", proxy=id)
    return JsonResponse({"id": id, "object": "proxy", "deleted": True})


def problem(state: ServerState, proxy: NamedProxy) -> str | None:
    """Why a proxy cannot be served now; None where it can."""
    try:
        with ExitStack() as held:
            steered_by(state, proxy, None, _any_messages, held)
    except Conflict as error:
        return error.message
    return None


def _any_messages(tokenizer: Tokenizer) -> list[int]:
    """Stands for a request's messages where names are resolved and nothing is generated."""
    return []


def _card(state: ServerState, proxy: NamedProxy) -> dict[str, Any]:
    error = problem(state, proxy)
    return {
        "id": proxy.id,
        "object": "proxy",
        "created": proxy.created,
        "state": "ready" if error is None else "broken",
        "error": error,
        "base": proxy.base or state.base_name,
        "expert": _stream(proxy.expert),
        "anti_expert": _stream(proxy.anti_expert),
        "alpha": proxy.alpha,
        "base_top_p": proxy.base_top_p,
    }


def _stream(stream: Stream) -> dict[str, Any]:
    """A stream as a body has it."""
    said: dict[str, Any] = {"model": stream.model, "adapter": stream.adapter, **stream.choices}
    if stream.members:
        said["adapters"] = [{"id": member.id, "weight": member.weight} for member in stream.members]
        said["combination"] = stream.combination
    if stream.own_template:
        said["own_template"] = True
    return {name: value for name, value in said.items() if value is not None}
