"""The application. It starts and stops nothing: the parts in its state belong to whoever made them."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from weft.server.http import admin, admin_proxies, compositions, errors, jobs, openai, ops
from weft.server.http.middleware import BodyLimit, RequestLog
from weft.server.http.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The HTTP application on ``state``."""
    app = FastAPI(
        title="weft",
        version=version("weft"),
        description="One frozen base model, many adapters, one mixed batch, over the OpenAI API.",
    )
    app.state.weft = state
    errors.install(app)
    for router in (
        openai.router,
        admin.vllm_router,
        admin.router,
        compositions.router,
        jobs.router,
        admin_proxies.router,
        ops.tokenizer_router,
        ops.router,
    ):
        app.include_router(router())
    app.add_middleware(BodyLimit, max_body=state.limits.max_body)
    app.add_middleware(RequestLog)  # the last added is the outermost
    return app
