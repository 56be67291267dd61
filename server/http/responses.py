"""Replies and requests in JSON through orjson: strict on what comes in, fast on what goes out."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse


class JsonResponse(JSONResponse):
    """A reply in JSON."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def revised(card: dict[str, Any], *, status: int = 200) -> JsonResponse:
    """What the admin API shows of something that has a revision, which is the reply's ``ETag``."""
    return JsonResponse(card, status_code=status, headers={"ETag": f'"{card["revision"]}"'})


class JsonRequest(Request):
    """A request whose JSON is read strictly: no NaN, no infinity, no lone surrogates, bounded depth."""

    async def json(self) -> Any:
        # Invalid: a json.JSONDecodeError, as FastAPI expects.
        return orjson.loads(await self.body())
