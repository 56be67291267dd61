"""What the routes work on. The command line (or Ray Serve) builds it and owns the start and stop of its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from weft.server.jobs import Jobs
from weft.server.tokenization import Tokenizer, Workers

if TYPE_CHECKING:
    from weft.server.http.auth import Keyring
    from weft.server.observability.metrics import Metrics
    from weft.server.registry.compositions import Compositions
    from weft.server.registry.proxies import Proxies
    from weft.server.registry.registry import AdapterRegistry
    from weft.server.runtime.client import EngineClient


@dataclass(frozen=True)
class HttpLimits:
    """Bounds on what one request may cost.

    Attributes:
        max_body: bytes of a request's body.
        max_sequences: prompts times ``n``.
        send_timeout: seconds a client may take no data from a stream before it is ended.
    """

    max_body: int = 16 << 20
    max_sequences: int = 1024
    send_timeout: float = 60.0


@dataclass(frozen=True)
class ServerState:
    """The parts of a running server.

    Attributes:
        base_names: names the base answers to; the first is its own.
        tokenizer: of the base, with the character limit of ``client.info.max_model_len``.
        proxy_tokenizers: of the proxy models, by name; they agree with the base's on what a token id means.
        created: unix seconds, for the base's model card.
    """

    client: EngineClient
    registry: AdapterRegistry
    tokenizer: Tokenizer
    metrics: Metrics
    keys: Keyring
    base_names: tuple[str, ...]
    compositions: Compositions
    proxies: Proxies
    proxy_tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    limits: HttpLimits = field(default_factory=HttpLimits)
    workers: Workers = field(default_factory=Workers)
    jobs: Jobs = field(default_factory=Jobs)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def base_name(self) -> str:
        return self.base_names[0]


def server_state(request: Request) -> ServerState:
    """The state of the application that ``request`` came to."""
    return cast(ServerState, request.app.state.weft)
