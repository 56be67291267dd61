"""A connection to a running server, for the commands that are its clients."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from weft.server.cli.state import read_admin_key
from weft.server.settings import Settings

if TYPE_CHECKING:
    import httpx


NEXT = {
    "invalid_api_key": "give the server's key as --admin-key or WEFT_ADMIN_KEY",
    "model_not_found": "weft adapter list shows the adapters there are",
    "composition_not_found": "weft compose list shows those there are",
    "proxy_not_found": "weft proxy list shows those there are",
    "adapter_exists": "take another id, or change what it means with weft adapter replace",
    "composition_exists": "take another id, or change what it means with weft compose replace",
    "proxy_exists": "take another id, or change what it means with weft proxy replace",
    "precondition_failed": "somebody changed it; look at it again with show",
}
"""What to do after an error, by its code."""


class RemoteError(Exception):
    """The server refused, or could not be reached; the message says why."""


class Server:
    """A connection to one server's admin API."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises ``RemoteError`` where ``url`` is none."""
        import httpx

        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Loading and draining take as long as they take; only connecting has a limit.
        timeout = httpx.Timeout(None, connect=5.0)
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise RemoteError(f"{url} is not a URL: {error}") from error

    @property
    def headers(self) -> Mapping[str, str]:
        """Sent with every request."""
        return self._client.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's JSON, None where there is none.

        Raises:
            RemoteError: no answer, or an error; with the server's own message.
        """
        import httpx

        try:
            reply = self._client.request(method, path, json=body, params=params, headers=headers)
        except httpx.HTTPError as error:
            raise RemoteError(
                f"no answer from {self._client.base_url}: {error or type(error).__name__}; start one with weft serve, "
                "or name another with --url"
            ) from error
        except ValueError as error:
            raise RemoteError(f"the request is no JSON: {error}") from error  # NaN, infinity
        if reply.is_success:
            return reply.json() if reply.content else None
        raise RemoteError(_reason(reply))

    def events(self, path: str) -> Iterator[Any]:
        """The server-sent events of a route, decoded. Raises ``RemoteError``."""
        import httpx

        try:
            with self._client.stream("GET", path) as reply:
                if not reply.is_success:
                    reply.read()
                    raise RemoteError(_reason(reply))
                for line in reply.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield json.loads(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise RemoteError(f"{self._client.base_url} broke off: {error or type(error).__name__}") from error


def connect(url: str | None, key: str | None, state_dir: Path | None) -> Server:
    """The server at ``url``, else the one that weft's settings here describe, with ``key``, else the one set or kept.

    Raises:
        ConfigError: the settings, or the kept key, cannot be read.
        RemoteError: ``url`` is no URL.
    """
    settings = Settings.load(state_dir=state_dir, admin_key=key)
    own = local_url(settings.host, settings.port)
    url = url or own
    if settings.admin_key is not None:
        return Server(url, settings.admin_key.get_secret_value())
    # The kept key is this machine's; it is not sent elsewhere.
    return Server(url, read_admin_key(settings.state_dir) if url == own or _is_loopback(url) else None)


def local_url(host: str, port: int) -> str:
    """The address of a server on this machine that listens on ``host`` and ``port``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(url: str) -> bool:
    import httpx

    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False


def _reason(reply: httpx.Response) -> str:
    try:
        error = reply.json()["error"]
        next_step = f"; {NEXT[error['code']]}" if error["code"] in NEXT else ""
        return f"{error['message']} ({reply.status_code}, {error['code']}){next_step}"
    except (ValueError, LookupError, TypeError):
        return f"{reply.status_code} {reply.reason_phrase} from {reply.request.url}"
