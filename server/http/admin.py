"""The admin API: adapters come, change and go while others are served. vLLM's two routes for it too."""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import PlainTextResponse, Response

from weft.adapters.errors import AdapterError
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, NotFound, RequestError
from weft.server.http.admin_schemas import AdapterLoad, AdapterReplace, VllmLoad, VllmUnload, adapter_card
from weft.server.http.auth import BEARER, AdminRoute
from weft.server.http.errors import DOCUMENTED, ErrorReply
from weft.server.http.responses import JsonResponse
from weft.server.http.state import ServerState, server_state
from weft.server.registry.records import AdapterRecord

log = structlog.get_logger(__name__)

MAX_FORCE_AFTER = 86400.0


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/admin", route_class=AdminRoute, tags=["admin"], responses=DOCUMENTED, dependencies=[BEARER]
    )
    routes.add_api_route("/adapters", load, methods=["POST"], status_code=201)
    routes.add_api_route("/adapters", list_adapters, methods=["GET"])
    routes.add_api_route("/adapters/{id}", show, methods=["GET"])
    routes.add_api_route("/adapters/{id}", replace, methods=["PUT"])
    routes.add_api_route("/adapters/{id}", unload, methods=["DELETE"])
    return routes


def vllm_router() -> APIRouter:
    """vLLM's routes, with its bodies and replies."""
    routes = APIRouter(prefix="/v1", route_class=AdminRoute, tags=["vLLM"], responses=DOCUMENTED, dependencies=[BEARER])
    routes.add_api_route("/load_lora_adapter", vllm_load, methods=["POST"])
    routes.add_api_route("/unload_lora_adapter", vllm_unload, methods=["POST"])
    return routes


async def load(request: Request, body: AdapterLoad) -> Response:
    """Load an adapter. Answers once it can be requested."""
    state = server_state(request)
    record = await state.registry.load(body.id, body.source, pinned=body.pinned, base=_proxy_model(state, body.base))
    log.info("admin.load", adapter=record.id, version=record.version, source=record.source)
    return await _card(state, record, status=201)


async def list_adapters(request: Request) -> Response:
    """All adapters."""
    state = server_state(request)
    stats = await _fresh_stats(state)
    return JsonResponse({"object": "list", "data": [adapter_card(record, stats) for record in state.registry.list()]})


async def show(request: Request, id: str) -> Response:
    """One adapter; its version is the reply's ``ETag``."""
    state = server_state(request)
    return await _card(state, state.registry.get(id))


async def replace(
    request: Request, id: str, body: AdapterReplace, if_match: Annotated[str | None, Header()] = None
) -> Response:
    """Move an id to another version in one step. Requests under way finish on the one they started with."""
    state = server_state(request)
    record = await state.registry.replace(id, body.source, pinned=body.pinned, if_match=if_match_version(if_match))
    log.info("admin.replace", adapter=record.id, version=record.version, source=record.source)
    return await _card(state, record)


async def unload(
    request: Request,
    id: str,
    force_after: Annotated[
        float | None,
        Query(ge=0, le=MAX_FORCE_AFTER, allow_inf_nan=False, description="Seconds, then end what still runs."),
    ] = None,
) -> Response:
    """Take an adapter away: no new requests at once; answers when those under way are through and it is freed."""
    await server_state(request).registry.unload(id, force_after=force_after)
    log.info("admin.unload", adapter=id)
    return JsonResponse({"id": id, "object": "adapter", "deleted": True})


async def vllm_load(request: Request, body: VllmLoad) -> Response:
    """vLLM's way to load an adapter."""
    state = server_state(request)
    registry, name = state.registry, body.lora_name
    try:
        base = _proxy_model(state, body.base_model_name)
        if body.load_inplace and any(record.id == name for record in registry.list()):
            await registry.replace(name, body.lora_path)
        else:
            await registry.load(name, body.lora_path, base=base)
    except (RequestError, AdapterError) as error:
        return _vllm_error(error)
    log.info("admin.load", adapter=name, source=body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def vllm_unload(request: Request, body: VllmUnload) -> Response:
    """vLLM's way to unload an adapter."""
    try:
        await server_state(request).registry.unload(body.lora_name)
    except RequestError as error:
        return _vllm_error(error)
    log.info("admin.unload", adapter=body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _vllm_error(error: RequestError | AdapterError) -> Response:
    """vLLM's types of error, and its habit to give the status as the code. The engine's absence stays what it is."""
    if isinstance(error, EngineUnavailable):
        raise error
    if isinstance(error, NotFound):
        return ErrorReply(404, "NotFoundError", error.message, error.param, 404).response()
    return ErrorReply(400, "InvalidUserInput", error.message, error.param, 400).response()


def _proxy_model(state: ServerState, base: str | None) -> str | None:
    """The proxy model that ``base`` names; None for the main one. Raises ``InvalidRequest``."""
    if base is None or base in state.base_names:
        return None
    proxies = state.client.info.proxies
    if base not in proxies:
        there = f", and its proxy models are {', '.join(map(repr, proxies))}" if proxies else ""
        raise InvalidRequest(
            f"'base' is {base[:64]!r}, but this server's base is {state.base_name!r}{there}",
            param="base",
            code="unknown_base",
        )
    return base


def if_match_version(if_match: str | None) -> str | None:
    """The version an ``If-Match`` header names, with or without quotes; None for ``*`` and no header."""
    if if_match is None or if_match.strip() == "*":
        return None
    version = if_match.strip().removeprefix('"').removesuffix('"')
    if not version or '"' in version:
        raise Conflict("'If-Match' must be one version in quotes", param="If-Match", code="precondition_failed")
    return version


async def _card(state: ServerState, record: AdapterRecord, *, status: int = 200) -> Response:
    card: dict[str, Any] = adapter_card(record, await _fresh_stats(state))
    return JsonResponse(card, status_code=status, headers={"ETag": f'"{record.version}"'})


async def _fresh_stats(state: ServerState) -> Any:
    try:
        return await state.client.refresh_stats()
    except EngineUnavailable:
        return state.client.stats  # where an adapter lies is the least of the operator's worries then
