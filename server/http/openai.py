"""OpenAI's routes: models, completions, chat completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import orjson
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from weft.server.errors import NotFound
from weft.server.http.arithmetic import problem
from weft.server.http.auth import BEARER, ApiRoute
from weft.server.http.chat import ChatFormat
from weft.server.http.completions import CompletionFormat
from weft.server.http.composition_schemas import composed_of
from weft.server.http.errors import DOCUMENTED
from weft.server.http.generation import opened
from weft.server.http.render import usage_dict
from weft.server.http.responses import JsonResponse
from weft.server.http.schemas import ChatBody, CompletionBody, StreamOptions
from weft.server.http.state import ServerState, server_state
from weft.server.http.stream import DONE, EventStream, while_connected
from weft.server.registry.compositions import NamedComposition
from weft.server.registry.proxies import NamedProxy
from weft.server.registry.records import AdapterRecord

Format = CompletionFormat | ChatFormat
PROXY_ONLY = {"proxy_only": True}
"""Marks the models that serve inside ``proxy`` and ``logit_arithmetic``, and cannot be a request's ``model``."""
CLIENT_LEFT = 499
"""nginx's status for it."""


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", route_class=ApiRoute, tags=["OpenAI"], responses=DOCUMENTED, dependencies=[BEARER])
    routes.add_api_route("/completions", completions, methods=["POST"])
    routes.add_api_route("/chat/completions", chat_completions, methods=["POST"])
    routes.add_api_route("/models", list_models, methods=["GET"])
    routes.add_api_route("/models/{model:path}", show_model, methods=["GET"])
    return routes


async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue a prompt, or each of a batch of prompts."""
    return await _answer(request, body, CompletionFormat(body, server_state(request).tokenizer))


async def chat_completions(request: Request, body: ChatBody) -> Response:
    """The next message of a conversation."""
    return await _answer(request, body, ChatFormat(body, server_state(request).tokenizer))


async def list_models(request: Request) -> Response:
    """The base, and the adapters, compositions and proxies that are served; then the proxy models."""
    state = server_state(request)
    cards = [_base_card(state, name) for name in state.base_names]
    cards += [_adapter_card(state, record) for record in state.registry.list() if record.state == "ready"]
    named = state.compositions
    cards += [_composition_card(state, one) for one in named.list() if named.state(one).error is None]
    cards += [_proxy_card(state, proxy) for proxy in state.proxies.list() if problem(state, proxy) is None]
    cards += [_proxy_model_card(state, name) for name in state.client.info.proxies]
    return JsonResponse({"object": "list", "data": cards})


async def show_model(request: Request, model: str) -> Response:
    """One model."""
    state = server_state(request)
    if model in state.base_names:
        return JsonResponse(_base_card(state, model))
    if composition := state.compositions.find(model):
        return JsonResponse(_composition_card(state, composition))
    if model in state.client.info.proxies:
        return JsonResponse(_proxy_model_card(state, model))
    if (proxy := state.proxies.find(model)) is not None:
        return JsonResponse(_proxy_card(state, proxy))
    return JsonResponse(_adapter_card(state, state.registry.get(model)))


def _base_card(state: ServerState, name: str) -> dict[str, Any]:
    info = state.client.info
    return _card(name, state.created, info.model, None, info.max_model_len)


def _adapter_card(state: ServerState, record: AdapterRecord) -> dict[str, Any]:
    return _card_of(state, record.id, record.created, record.source, record.base)


def _proxy_card(state: ServerState, proxy: NamedProxy) -> dict[str, Any]:
    base = proxy.base or state.base_name
    return _card(proxy.id, proxy.created, f"proxy of {base}", base, state.client.info.max_model_len)


def _proxy_model_card(state: ServerState, name: str) -> dict[str, Any]:
    info = state.client.info.proxies[name]
    return _card(name, state.created, info.model, None, info.max_model_len) | PROXY_ONLY


def _composition_card(state: ServerState, composition: NamedComposition) -> dict[str, Any]:
    base = composition.base
    card = _card_of(state, composition.id, composition.created, base or state.base_name, base)
    return {**card, **composed_of(composition)}


def _card_of(state: ServerState, name: str, created: float, root: str, base: str | None) -> dict[str, Any]:
    """Of what belongs to a proxy model, or where ``base`` is None to the main one."""
    info = state.client.info
    if base is None:
        return _card(name, created, root, state.base_name, info.max_model_len)
    if base not in info.proxies:  # the server was started without it
        raise NotFound(f"{name!r} is not served: its model {base!r} is not there", param="model")
    return _card(name, created, root, base, info.proxies[base].max_model_len) | PROXY_ONLY


def _card(name: str, created: float, root: str, parent: str | None, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "weft",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }


async def _answer(request: Request, body: CompletionBody | ChatBody, form: Format) -> Response:
    state = server_state(request)
    request_id = f"{form.id_prefix}-{uuid4().hex}"
    request.state.model = body.model
    head = {"id": request_id, "object": form.name, "created": int(time.time()), "model": body.model}
    if body.stream:
        head["object"] = form.chunk_name
        events = _events(state, form, head, body.stream_options)
        return EventStream(events, send_timeout=state.limits.send_timeout)
    try:
        return JsonResponse(await while_connected(request.receive, _reply(state, form, head)))
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)  # for the log; nobody reads it


async def _reply(state: ServerState, form: Format, head: dict[str, Any]) -> dict[str, Any]:
    async with opened(state, form.plan(head["id"])) as generation:
        choices = await generation.collect()
        if generation.plan.params.prompt_logprobs is None:
            reply = form.reply(generation, choices)
        else:  # an entry per prompt token, which may be very many
            reply = await state.workers.run(form.reply, generation, choices)
        return {**head, **reply, "usage": usage_dict(generation.usage)}


async def _events(
    state: ServerState, form: Format, head: dict[str, Any], options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, encoded."""
    usage_last = options is not None and options.include_usage is True
    usage_always = options is not None and options.continuous_usage_stats is True
    encoder = _EventEncoder(head, with_usage=usage_last)
    async with opened(state, form.plan(head["id"])) as generation:
        extra = form.first_chunk(generation)
        started: set[int] = set()
        async with aclosing(generation.pieces()) as pieces:
            async for index, delta in pieces:
                first = index not in started
                if not (first or delta.text or delta.finish_reason or delta.logprobs or form.tells_ids):
                    continue  # the token's text is still held back
                started.add(index)
                for choice in form.chunks(generation, index, delta, first=first):
                    if usage_always:
                        extra["usage"] = usage_dict(generation.usage)
                    yield encoder.event(choice, extra)
                    extra = {}
        if usage_last:
            yield encoder.event(None, {"usage": usage_dict(generation.usage)})
        yield DONE


class _EventEncoder:
    """Encodes events of one stream. What is equal in all of them is encoded once: it is most of each."""

    def __init__(self, head: dict[str, Any], *, with_usage: bool) -> None:
        self._prefix = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def event(self, choice: dict[str, Any] | None, extra: dict[str, Any]) -> bytes:
        """An event with ``choice`` (None: with no choice) and, at its top level, ``extra``."""
        encoded = b"" if choice is None else orjson.dumps(choice)
        suffix = b"]," + orjson.dumps(extra)[1:] + b"\n\n" if extra else self._suffix
        return self._prefix + encoded + suffix
