"""The admin API: jobs, their events, and how to end them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from weft.server.http.auth import BEARER, AdminRoute
from weft.server.http.composition_schemas import job_card
from weft.server.http.errors import DOCUMENTED
from weft.server.http.responses import JsonResponse
from weft.server.http.state import server_state
from weft.server.http.stream import DONE, EventStream
from weft.server.jobs import Job

KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that nobody between takes the stream for dead."""


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(
        prefix="/admin/jobs", route_class=AdminRoute, tags=["jobs"], responses=DOCUMENTED, dependencies=[BEARER]
    )
    routes.add_api_route("", list_jobs, methods=["GET"])
    routes.add_api_route("/{id}", show, methods=["GET"])
    routes.add_api_route("/{id}", cancel, methods=["DELETE"])
    routes.add_api_route("/{id}/events", events, methods=["GET"])
    return routes


async def list_jobs(request: Request) -> Response:
    """All jobs since the server started, but only so many of those that have ended."""
    return JsonResponse({"object": "list", "data": [job_card(job) for job in server_state(request).jobs.list()]})


async def show(request: Request, id: str) -> Response:
    """One job."""
    return JsonResponse(job_card(server_state(request).jobs.get(id)))


async def cancel(request: Request, id: str) -> Response:
    """End a job. One that has ended stays as it is."""
    return JsonResponse(job_card(await server_state(request).jobs.cancel(id)))


async def events(request: Request, id: str) -> Response:
    """A job's events from the first on, as server-sent events; the last one is the job itself."""
    state = server_state(request)
    return EventStream(_encoded(state.jobs.get(id)), send_timeout=state.limits.send_timeout)


async def _encoded(job: Job) -> AsyncGenerator[bytes, None]:
    yield b": " + job.id.encode() + b"\n\n"  # the reply starts with what is sent first, and a job may take its time
    async with aclosing(job.follow(KEEP_ALIVE)) as told:
        async for event in told:
            yield b": still running\n\n" if event is None else b"data: " + orjson.dumps(event) + b"\n\n"
    yield b"data: " + orjson.dumps({"type": "end", "job": job_card(job)}) + b"\n\n"
    yield DONE
