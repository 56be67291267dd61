"""Who may call what: API keys for the OpenAI routes where any are set, the admin key for the admin API always."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.responses import Response

from weft.server.http.errors import Unauthorized
from weft.server.http.responses import JsonRequest
from weft.server.http.state import server_state

BEARER = Security(HTTPBearer(auto_error=False, description="The API key, or the admin key for the admin API."))
"""Documents the header; the route classes check it."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Keyring:
    """The keys of a server.

    Args:
        api_keys: any of them opens the OpenAI routes; none: these are open to everyone.
        admin_key: opens everything.
    """

    def __init__(self, admin_key: str, api_keys: tuple[str, ...] = ()) -> None:
        if not admin_key or not all(api_keys):
            raise ValueError("a key must not be empty")
        self._admin = admin_key.encode()
        self._api = tuple(key.encode() for key in api_keys)

    def check_api(self, headers: Headers) -> None:
        """Raises ``Unauthorized`` unless the caller may use the models."""
        if self._api and not _matches(_bearer(headers), (*self._api, self._admin)):
            raise Unauthorized("this server needs an API key: send 'Authorization: Bearer KEY' with a valid one")

    def check_admin(self, headers: Headers) -> None:
        """Raises ``Unauthorized`` unless the caller may administer the server."""
        if not _matches(_bearer(headers), (self._admin,)):
            raise Unauthorized("this route needs the admin key: send 'Authorization: Bearer KEY' with it")


class ApiRoute(APIRoute):
    """A route for those who may use the models. The key is checked before the body is read."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def authorized(request: Request) -> Response:
            self.authorize(server_state(request).keys, request.headers)
            return await handle(JsonRequest(request.scope, request.receive))

        return authorized

    def authorize(self, keys: Keyring, headers: Headers) -> None:
        keys.check_api(headers)


class AdminRoute(ApiRoute):
    """A route for those who may administer the server."""

    def authorize(self, keys: Keyring, headers: Headers) -> None:
        keys.check_admin(headers)


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    # Header values are latin-1 to Starlette; keys are compared as the bytes that were sent.
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _matches(given: bytes, keys: tuple[bytes, ...]) -> bool:
    # Every key is compared, in constant time: how long it takes says nothing about any of them.
    return any([hmac.compare_digest(given, key) for key in keys])
