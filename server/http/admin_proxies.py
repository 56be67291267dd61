"""The admin API of named proxies."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from weft.server.http.admin import if_match_version
from weft.server.http.admin_schemas import ProxyCreate, ProxyReplace
from weft.server.http.arithmetic import any_messages, problem, steering
from weft.server.http.auth import BEARER, AdminRoute
from weft.server.http.errors import DOCUMENTED
from weft.server.http.resolution import Wanted, leased
from weft.server.http.responses import JsonResponse, revised
from weft.server.http.state import ServerState, server_state
from weft.server.registry.proxies import NamedProxy, Stream

log = structlog.get_logger(__name__)


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/admin/proxies", route_class=AdminRoute, tags=["admin"], responses=DOCUMENTED, dependencies=[BEARER]
    )
    routes.add_api_route("", create, methods=["POST"], status_code=201)
    routes.add_api_route("", list_proxies, methods=["GET"])
    routes.add_api_route("/{id}", show, methods=["GET"])
    routes.add_api_route("/{id}", replace, methods=["PUT"])
    routes.add_api_route("/{id}", delete, methods=["DELETE"])
    return routes


async def create(request: Request, body: ProxyCreate) -> Response:
    """Name a proxy. Requests use it as their ``model``; its members must be served."""
    state = server_state(request)
    state.registry.names.check_free(body.id)
    proxy = await state.proxies.keep(_named(state, body.id, int(time.time()), body))
    log.info("admin.proxy_created", proxy=proxy.id)
    return revised(_card(state, proxy), status=201)


async def list_proxies(request: Request) -> Response:
    """All named proxies."""
    state = server_state(request)
    return JsonResponse({"object": "list", "data": [_card(state, proxy) for proxy in state.proxies.list()]})


async def show(request: Request, id: str) -> Response:
    """One named proxy, and whether it can be served now; its revision is the reply's ``ETag``."""
    state = server_state(request)
    return revised(_card(state, state.proxies.get(id)))


async def replace(
    request: Request, id: str, body: ProxyReplace, if_match: Annotated[str | None, Header()] = None
) -> Response:
    """Have an id mean another proxy. Requests under way finish with the one they started with."""
    state = server_state(request)
    proxy = await state.proxies.change(id, lambda old: _named(state, id, old.created, body), if_match_version(if_match))
    log.info("admin.proxy_replaced", proxy=proxy.id)
    return revised(_card(state, proxy))


async def delete(request: Request, id: str) -> Response:
    """Forget a named proxy. Requests under way finish; its members stay."""
    await server_state(request).proxies.delete(id)
    log.info("admin.proxy_deleted", proxy=id)
    return JsonResponse({"id": id, "object": "proxy", "deleted": True})


def _named(state: ServerState, id: str, created: int, body: ProxyReplace) -> NamedProxy:
    """The proxy that a body asks for. Raises ``RequestError``, naming the field, where it could not be served now."""
    asked = body.asked(field="")
    with ExitStack() as held:
        own = leased(state, Wanted(body.base or state.base_name, at="base"), held)
        steering(state, asked, own, {}, any_messages, held)
    expert, anti_expert = (term.stream for term in asked.terms)
    return NamedProxy(id, created, expert, anti_expert, body.base, asked.terms[0].weight, body.base_top_p)


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
        "revision": proxy.revision,
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
