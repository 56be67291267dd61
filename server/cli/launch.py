"""What ``weft serve`` does, from settings to exit: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog
import typer
import uvicorn

from weft.adapters.errors import AdapterError
from weft.server.cli.adapter import absolute, summary
from weft.server.cli.client import local_url
from weft.server.cli.display import Display
from weft.server.cli.greeting import Greeting
from weft.server.cli.state import KEY_FILE, base_folder, keep_admin_key, locked
from weft.server.config import ConfigError
from weft.server.errors import RequestError
from weft.server.observability import logs
from weft.server.registry.compositions import Compositions
from weft.server.registry.proxies import Proxies
from weft.server.registry.records import check_id
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient
from weft.server.settings import GivenAdapter, Settings, default_state_dir

if TYPE_CHECKING:
    from weft.server.cli.assembly import Tokenizers

log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is under way for at most ``settings.drain_timeout`` seconds.

    Raises:
        ConfigError: a setting cannot be honoured, or the model or an adapter cannot be served.
    """
    config = settings.engine_config()
    check_names(settings)
    log_config = logs.LogConfig(settings.log_level, settings.log_format)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the engine's process inherits it
    # What fails fast comes before what takes long: the address and the state directory, then the model.
    with (
        listening_socket(settings.host, settings.port) as listener,
        locked(base_folder(settings.state_dir, settings.model)) as folder,
        Signals() as signals,
        suppress(asyncio.CancelledError),
    ):
        async with AsyncExitStack() as stack:
            with Display() as display:
                logs.configure(log_config, stream=display.stream)
                client = EngineClient(config, logging=log_config, on_progress=display.stage)
                stack.push_async_callback(client.stop)
                # The import takes seconds, for transformers; so does loading, in the engine's process.
                _, tokenizers = await asyncio.gather(client.start(), asyncio.to_thread(_tokenizers, settings))
                registry = _registry(settings, client, folder)
                # Before adapters are loaded: they share the ids.
                compositions, proxies = Compositions(folder, registry), Proxies(folder, registry)
                await load_adapters(registry, given_adapters(settings), display)
            logs.configure(log_config)
            server = _http_server(settings, client, compositions, proxies, tokenizers, listener, stack)
            signals.drain = server.drain
            await server.serve(sockets=[listener])


def check_names(settings: Settings) -> None:
    """Raises ``ConfigError`` where a proxy model cannot have its name, or two adapters have one id."""
    given_adapters(settings)
    for name in settings.proxy_model:
        try:
            check_id(name, settings.base_names)
        except RequestError as error:
            raise ConfigError(f"proxy_model: {name!a} cannot be a model's name: {error}") from error


def _tokenizers(settings: Settings) -> Tokenizers:
    from weft.server.cli.assembly import read_tokenizers

    return read_tokenizers(settings)


def _registry(settings: Settings, client: EngineClient, folder: Path) -> AdapterRegistry:
    name, *aliases = settings.base_names
    return AdapterRegistry(
        client,
        folder,
        roots=allowed_roots(settings),
        base_name=name,
        base_aliases=aliases,
        proxy_models=tuple(settings.proxy_model),
    )


def _http_server(
    settings: Settings,
    client: EngineClient,
    compositions: Compositions,
    proxies: Proxies,
    tokenizers: Tokenizers,
    listener: socket.socket,
    stack: AsyncExitStack,
) -> HttpServer:
    from weft.server.cli.assembly import create_application

    admin_key, is_new = admin_key_of(settings)
    if is_new:
        typer.echo(f"admin key, kept in {settings.state_dir / KEY_FILE}: {admin_key}")
    app = create_application(settings, client, compositions, proxies, tokenizers, admin_key)
    stack.callback(app.state.weft.workers.close)
    stack.push_async_callback(app.state.weft.jobs.close)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # the application logs requests itself
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
    )
    port = listener.getsockname()[1]
    return HttpServer(
        config,
        client,
        on_ready=lambda: announce(settings, compositions.registry, port),
        on_drain=app.state.weft.jobs.stop,  # or those who follow one would be waited for
    )


def admin_key_of(settings: Settings) -> tuple[str, bool]:
    """The admin key, given or kept; whether it was generated just now."""
    if settings.admin_key is not None:
        return settings.admin_key.get_secret_value(), False
    return keep_admin_key(settings.state_dir)


async def load_adapters(registry: AdapterRegistry, given: Sequence[GivenAdapter], display: Display) -> None:
    """Those of the last run, then those given, each under its id whatever stood there before.

    Raises:
        ConfigError: one of those given cannot be served; the message names it and says why.
    """
    await registry.restore()  # which logs what is wrong with those it cannot bring back
    display.stage("loading adapters", len(given))
    for adapter in given:
        try:
            record = await registry.ensure(adapter.id, absolute(adapter.source), base=adapter.base)
        except (AdapterError, RequestError) as error:
            raise ConfigError(f"adapter {adapter.id}: {error}") from error
        display.adapter(adapter.id, summary(asdict(record.info)))


def given_adapters(settings: Settings) -> list[GivenAdapter]:
    """The adapters to serve: those given, and with the demo its own."""
    given = settings.adapters
    if not settings.is_demo:
        return [*given]
    from weft.server.demo import demo_adapters

    replaced = {adapter.id for adapter in given}
    own = (GivenAdapter(id, str(folder)) for id, folder in demo_adapters().items() if id not in replaced)
    return [*own, *given]


def allowed_roots(settings: Settings) -> list[Path]:
    """Folders local sources may lie in: those allowed for the admin API, and those of the given adapters themselves."""
    paths = [adapter.source.removeprefix("file://") for adapter in given_adapters(settings)]
    given = [Path(absolute(path)) for path in paths if "://" not in path]
    return [*(root.expanduser().resolve() for root in settings.adapter_root), *given]


def announce(settings: Settings, registry: AdapterRegistry, port: int) -> None:
    """Print that the server serves, with commands to try."""
    prompts: dict[str, str] = {}
    if settings.is_demo:
        from weft.server.demo import demo_examples

        prompts = demo_examples()
    given, url = given_adapters(settings), local_url(settings.host, port)
    elsewhere = settings.state_dir != default_state_dir()
    kept = f"$(cat {shlex.quote(str(settings.state_dir.resolve() / KEY_FILE))})"
    greeting = Greeting(
        url=url,
        base=settings.base_names[0],
        adapters=_ready(registry, None),
        proxies={name: _ready(registry, name) for name in settings.proxy_model},
        prompts=prompts,
        source=absolute(given[0].source) if given else "hf://organisation/adapter",
        client_options=("--url", url, *(("--state-dir", str(settings.state_dir.resolve())) if elsewhere else ())),
        api_key="$WEFT_API_KEY" if settings.api_key else None,
        admin_key=kept if settings.admin_key is None else "$WEFT_ADMIN_KEY",
    )
    typer.echo(greeting.text())


def _ready(registry: AdapterRegistry, base: str | None) -> tuple[str, ...]:
    """The ids of a model's adapters that are served."""
    return tuple(record.id for record in registry.list() if record.state == "ready" and record.base == base)


class HttpServer(uvicorn.Server):
    """uvicorn, told when to stop instead of listening to signals itself (which would end the process by the signal)."""

    def __init__(
        self,
        config: uvicorn.Config,
        client: EngineClient,
        *,
        on_ready: Callable[[], None],
        on_drain: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._client = client
        self._on_ready = on_ready
        self._on_drain = on_drain

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody took the port while the model was loading
            raise ConfigError(f"port: cannot listen: {error.strerror}") from error
        self._on_ready()

    def drain(self) -> None:
        """Take no new requests, finish those under way, then stop; the second time, stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._client.unready_reason = "the server is stopping"
        self._on_drain()
        log.info("server.draining")


class Signals:
    """SIGINT and SIGTERM. Until ``drain`` is set they cancel the task that entered this; then they call it."""

    def __init__(self) -> None:
        self.drain: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, lambda: (self.drain or task.cancel)())
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)


@contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address. It does not listen yet, so clients are refused, not kept waiting, while we load.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port: {port} on {host} is in use; choose another with --port") from error
        raise ConfigError(f"host: cannot listen on {host}: {error.strerror}") from error
    with bound:
        yield bound
