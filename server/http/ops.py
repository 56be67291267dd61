"""For operators and tools: health, metrics, version, and the tokenizer."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from weft.server.errors import EngineUnavailable, NotFound
from weft.server.http.admin_schemas import DetokenizeBody, TokenizeBody
from weft.server.http.auth import BEARER, ApiRoute
from weft.server.http.chat import encode_chat
from weft.server.http.errors import DOCUMENTED
from weft.server.http.responses import JsonResponse
from weft.server.http.state import ServerState, server_state


def router() -> APIRouter:
    """The routes that need no key."""
    routes = APIRouter(tags=["operations"], responses=DOCUMENTED)
    routes.add_api_route("/livez", live, methods=["GET"])
    for path in ("/readyz", "/health"):
        routes.add_api_route(path, ready, methods=["GET"])
    routes.add_api_route("/ping", ping, methods=["GET"])
    routes.add_api_route("/ping", ping, methods=["POST"], include_in_schema=False)
    routes.add_api_route("/version", show_version, methods=["GET"])
    routes.add_api_route("/metrics", metrics, methods=["GET"])
    routes.add_api_route("/", landing, methods=["GET"])
    return routes


def tokenizer_router() -> APIRouter:
    """The tokenizer's routes, for those who may use the models."""
    routes = APIRouter(route_class=ApiRoute, tags=["tokenizer"], responses=DOCUMENTED, dependencies=[BEARER])
    routes.add_api_route("/tokenize", tokenize, methods=["POST"])
    routes.add_api_route("/detokenize", detokenize, methods=["POST"])
    routes.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"])
    return routes


async def live() -> Response:
    """200 while the server's process works at all."""
    return JsonResponse({"status": "alive"})


async def ready(request: Request) -> Response:
    """200 only when requests will be served."""
    _check_ready(server_state(request))
    return JsonResponse({"status": "ready"})


ping = ready


async def show_version() -> Response:
    """weft's version."""
    return JsonResponse({"version": version("weft")})


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    rendered = server_state(request).metrics.renderer(request.headers.get("accept", ""))
    content, content_type = await asyncio.to_thread(rendered)
    return Response(content, headers={"Content-Type": content_type})


async def landing(request: Request) -> Response:
    """What this is and where to go on."""
    state = server_state(request)
    models = [*state.base_names, *state.registry.names.ids()]
    return JsonResponse({"name": "weft", "version": version("weft"), "docs": "/docs", "models": models})


async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """The token ids of a prompt or a conversation."""
    state = server_state(request)
    _check_model(state, body.model)
    token_ids = await state.workers.run(_tokenize, state, body)
    reply: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": state.client.info.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        reply["token_strs"] = [state.tokenizer.token_text(token_id) for token_id in token_ids]
    return JsonResponse(reply)


async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of token ids."""
    state = server_state(request)
    _check_model(state, body.model)
    return JsonResponse({"prompt": await state.workers.run(state.tokenizer.decode, body.tokens)})


async def tokenizer_info(request: Request) -> Response:
    """Special tokens and chat template, under the names of transformers' ``tokenizer_config.json``."""
    state = server_state(request)
    backend = state.tokenizer.backend
    special = {name: str(token) for name, token in backend.special_tokens_map.items() if isinstance(token, str)}
    info = {
        "tokenizer_class": type(backend).__name__,
        "chat_template": state.tokenizer.chat_template,
        "model_max_length": state.client.info.max_model_len,
        "vocab_size": len(backend),
        "fingerprint": await state.workers.run(state.tokenizer.fingerprint),
    }
    return JsonResponse({**special, **info})


def _tokenize(state: ServerState, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        return encode_chat(state.tokenizer, body.messages, body)
    return state.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


def _check_model(state: ServerState, model: str | None) -> None:
    """Raises ``NotFound`` for a model there is not. All share the base's tokenizer."""
    models = {*state.base_names, *state.client.info.proxies}
    if model is not None and model not in models and not state.registry.names.known(model):
        raise NotFound(f"there is no model {model[:64]!a}", param="model")


def _check_ready(state: ServerState) -> None:
    if not state.client.ready:
        raise EngineUnavailable(state.client.unready_reason or "the engine is not ready")
