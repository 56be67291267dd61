"""``weft adapter …``: a client of the admin API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.server.cli.remote import (
    IfMatch,
    Json,
    Key,
    StateDir,
    Url,
    busy,
    connected,
    matching,
    path_of,
    print_answer,
    print_table,
)
from weft.server.cli.terminal import bytes_text

PATH = "/admin/adapters"
Id = Annotated[str, typer.Argument(metavar="ID", help="The adapter's id, the `model` of requests.", show_default=False)]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder, hf://org/repo@revision, or another URL.", show_default=False)
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
        record = server.request("POST", PATH, body)
    print_answer(record, as_json, f"{id} is loaded: {summary(record)}")


def list_(url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """List the adapters."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("GET", PATH)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_table(answer["data"])


def show(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Show everything about one adapter."""
    with connected(url, admin_key, state_dir) as server:
        record = server.request("GET", path_of(PATH, id))
    width = max(map(len, record))
    print_answer(record, as_json, "\n".join(f"{name:<{width}}  {_text(name, value)}" for name, value in record.items()))


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
        answer = server.request("DELETE", path_of(PATH, id), params=query)
    print_answer(answer, as_json, f"{id} is unloaded")


def replace(
    id: Id,
    source: Source,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--no-pinned", help="Default: as it was.", show_default=False)
    ] = None,
    if_match: IfMatch = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Move ID to another version in one step; requests under way finish on the one they started with."""
    body: dict[str, object] = {"source": absolute(source)}
    if pinned is not None:
        body["pinned"] = pinned
    with connected(url, admin_key, state_dir) as server, busy(f"replacing {id}"):
        record = server.request("PUT", path_of(PATH, id), body, headers=matching(if_match))
    print_answer(record, as_json, f"{id} is replaced: {summary(record)}")


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


def _text(name: str, value: object) -> str:
    if name == "nbytes" and isinstance(value, int):
        return bytes_text(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _print_table(records: Sequence[Mapping[str, Any]]) -> None:
    columns = ("id", "base", "method", "forms", "rank", "size", "state", "tier", "requests", "version")
    rows = []
    for record in records:
        cells = {
            **record,
            "forms": "+".join(record["forms"]),
            "size": bytes_text(record["nbytes"]),
            "requests": record.get("refcount"),
            "version": record["version"][:12],
        }
        rows.append([_text(column, cells.get(column)) for column in columns])
    print_table(columns, rows)
