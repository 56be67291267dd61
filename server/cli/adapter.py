"""``weft adapter …``: a client of the admin API."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from weft.server.cli.client import RemoteError, Server, connect
from weft.server.cli.terminal import bytes_text, failing_clearly
from weft.server.config import ConfigError

Id = Annotated[str, typer.Argument(metavar="ID", help="The adapter's id, the `model` of requests.", show_default=False)]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder, hf://org/repo@revision, or another URL.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="WEFT_URL", help="The server; default: this machine's, by weft's settings.", show_default=False
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        help="Default: WEFT_ADMIN_KEY, else the key a server on this machine has kept.",
        show_default=False,
    ),
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where that server keeps its key.", show_default=False)
]


def create_cli() -> typer.Typer:
    """The group of commands, as a typer application."""
    cli = typer.Typer(
        no_args_is_help=True, help="Load, list, show, unload and replace the adapters of a running server."
    )
    for command in (load, list_, show, unload, replace):
        cli.command(command.__name__.rstrip("_"))(command)
    return cli


def load(
    id: Id,
    source: Source,
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep its weights on the device.")] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="The proxy model it belongs to; default: the main model."),
    ] = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Load an adapter and serve it under ID."""
    body: dict[str, object] = {"id": id, "source": absolute(source), "pinned": pinned}
    if base is not None:
        body["base"] = base
    with connected(url, admin_key, state_dir) as server, busy(f"loading {id}"):
        record = server.request("POST", "/admin/adapters", body)
    _print(record, as_json, f"{id} is loaded: {summary(record)}")


def list_(url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """List the adapters."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("GET", "/admin/adapters")
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_table(answer["data"])


def show(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Show everything about one adapter."""
    with connected(url, admin_key, state_dir) as server:
        record = server.request("GET", _path(id))
    width = max(map(len, record))
    _print(record, as_json, "\n".join(f"{name:<{width}}  {_text(name, value)}" for name, value in record.items()))


def unload(
    id: Id,
    force_after: Annotated[
        float | None,
        typer.Option(
            "--force-after", metavar="SECONDS", min=0, help="End requests still running then; default: wait for them."
        ),
    ] = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Stop serving an adapter: no new requests, those running finish, its memory is freed."""
    query = {} if force_after is None else {"force_after": str(force_after)}
    with connected(url, admin_key, state_dir) as server, busy(f"draining {id}"):
        answer = server.request("DELETE", _path(id), params=query)
    _print(answer, as_json, f"{id} is unloaded")


def replace(
    id: Id,
    source: Source,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--no-pinned", help="Default: as it was.", show_default=False)
    ] = None,
    if_match: Annotated[
        str | None,
        typer.Option(
            "--if-match", metavar="VERSION", help="Only if this is the version served now.", show_default=False
        ),
    ] = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Move ID to another version in one step; requests under way finish on the one they started with."""
    body: dict[str, object] = {"source": absolute(source)}
    if pinned is not None:
        body["pinned"] = pinned
    headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
    with connected(url, admin_key, state_dir) as server, busy(f"replacing {id}"):
        record = server.request("PUT", _path(id), body, headers=headers)
    _print(record, as_json, f"{id} is replaced: {summary(record)}")


def absolute(source: str) -> str:
    """A path made absolute, since the server's working directory is another; a URL as it is."""
    return source if "://" in source else str(Path(source).expanduser().resolve())


def summary(record: Mapping[str, Any]) -> str:
    """One line on how an adapter is served."""
    forms = "+".join(record["forms"])
    return (
        f"{record['method']} as {forms}, rank {record['rank']}, {record['num_sites']} sites, "
        f"{bytes_text(record['nbytes'])}, version {record['version'][:12]}"
    )


@contextmanager
def connected(url: str | None, key: str | None, state_dir: Path | None) -> Iterator[Server]:
    """The server that a command is for; what it refuses ends the command."""
    with failing_clearly(ConfigError, RemoteError), connect(url, key, state_dir) as server:
        yield server


def _path(id: str) -> str:
    return f"/admin/adapters/{quote(id, safe='')}"


def busy(text: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def _text(name: str, value: object) -> str:
    if name == "nbytes" and isinstance(value, int):
        return bytes_text(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _print(answer: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(answer, indent=2) if as_json else text)


def _print_table(records: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("id", "base", "method", "forms", "rank", "size", "state", "tier", "requests", "version")
    table = Table(*columns)
    for record in records:
        cells = {
            **record,
            "forms": "+".join(record["forms"]),
            "size": bytes_text(record["nbytes"]),
            "requests": record.get("refcount"),
            "version": record["version"][:12],
        }
        # Text, not str: brackets in an id are no markup.
        table.add_row(*(Text(_text(column, cells.get(column))) for column in columns))
    # Elsewhere than on a terminal rich takes 80 columns, and breaks the rows for it.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
