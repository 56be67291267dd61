"""``weft compose …``: named compositions of a running server, and the search for their weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.server.cli.client import RemoteError, Server
from weft.server.cli.plot import curve
from weft.server.cli.remote import (
    IfMatch,
    Json,
    Key,
    StateDir,
    Url,
    busy,
    connected,
    finite,
    matching,
    path_of,
    print_answer,
    print_table,
)
from weft.server.cli.terminal import fail

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = "/admin/compositions"
Id = Annotated[
    str, typer.Argument(metavar="ID", help="The composition's id, the `model` of requests.", show_default=False)
]
Members = Annotated[
    list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="The adapters and their weights.", show_default=False)
]
Combination = Annotated[
    str, typer.Option("--combination", help="lorahub: (Σ w B)(Σ w A). linear: Σ w ΔW.", metavar="NAME")
]
Description = Annotated[str | None, typer.Option("--description", help="For those who list it.", show_default=False)]


def create_cli() -> typer.Typer:
    """The group of commands, as a typer application."""
    cli = typer.Typer(
        no_args_is_help=True,
        help="Name, list, show, replace and delete compositions of adapters on a running server; find their weights.",
    )
    for command in (list_, create, show, replace, delete, fit):
        cli.command(command.__name__.rstrip("_"))(command)
    return cli


def list_(url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """List the named compositions."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("GET", PATH)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_table(answer["data"])


def create(
    id: Id,
    members: Members,
    combination: Combination = "lorahub",
    description: Description = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Name a composition of adapters and serve it under ID."""
    body = {"id": id, **_body(members, combination, description)}
    with connected(url, admin_key, state_dir) as server, busy(f"composing {id}"):
        record = server.request("POST", PATH, body)
    print_answer(record, as_json, f"{id} is served: {summary(record)}")


def show(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Show a composition, and the losses of the search that found it, if one did."""
    with connected(url, admin_key, state_dir) as server:
        record = server.request("GET", path_of(PATH, id))
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(f"{id} ({record['state']}): {summary(record)}")
    for name in ("error", "description", "base", "revision"):
        if record[name]:
            typer.echo(f"{name}: {record[name]}")
    if found := record["provenance"]:
        candidates = ", ".join(f"{one['id']} ({one['version'][:12]})" for one in found["candidates"])
        typer.echo(
            f"found by {found['optimizer']} on {found['examples']['count']} examples, budget {found['budget']}, "
            f"seed {found['seed']}, among {candidates}; loss {found['loss']:.4f}\n{curve(found['losses'])}"
        )


def replace(
    id: Id,
    members: Members,
    combination: Combination = "lorahub",
    description: Description = None,
    if_match: IfMatch = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Have ID mean another composition in one step; requests under way finish on the one they started with."""
    body = _body(members, combination, description)
    with connected(url, admin_key, state_dir) as server, busy(f"composing {id}"):
        record = server.request("PUT", path_of(PATH, id), body, headers=matching(if_match))
    print_answer(record, as_json, f"{id} is replaced: {summary(record)}")


def delete(id: Id, url: Url = None, admin_key: Key = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Forget a composition; its adapters stay."""
    with connected(url, admin_key, state_dir) as server:
        answer = server.request("DELETE", path_of(PATH, id))
    print_answer(answer, as_json, f"{id} is deleted")


def fit(
    id: Id,
    candidates: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="The adapters to weigh.")],
    examples: Annotated[
        Path,
        typer.Option(
            "--examples",
            metavar="FILE",
            help='A line of JSON each: {"prompt": "...", "completion": "..."}; - is standard input.',
            show_default=False,
        ),
    ],
    budget: Annotated[int, typer.Option(help="How many weightings are scored.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the optimizer.")] = 42,
    optimizer: Annotated[str, typer.Option(help="Of nevergrad: NGOpt, Shiwa or CMA.")] = "NGOpt",
    l1: Annotated[float, typer.Option(help="What the mean size of the weights counts beside the loss.")] = 0.05,
    round_size: Annotated[int, typer.Option(help="Weightings scored together.")] = 1,
    combination: Combination = "lorahub",
    description: Description = None,
    url: Url = None,
    admin_key: Key = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Find the weights of adapters that do best on a few examples (LoRAHub), and serve the result under ID.

    The search is a job of the server's; Ctrl-C cancels it.
    """
    body = {
        "save_as": id, "candidates": candidates, "examples": read_examples(examples), "budget": budget, "seed": seed,
        "optimizer": optimizer, "l1": l1, "round_size": round_size, "combination": combination,
        **({} if description is None else {"description": description}),
    }  # fmt: skip
    with connected(url, admin_key, state_dir) as server:
        with busy("checking the adapters"):
            job = server.request("POST", f"{PATH}/fit", body)
        job = _follow(server, job, budget)
    if job["state"] != "succeeded":
        fail(f"the search {job['state']}{': ' + job['error'] if job['error'] else ''}")
    if as_json:
        typer.echo(json.dumps(job, indent=2))
        return
    typer.echo(curve(job["losses"]))
    found = {"adapters": job["result"]["adapters"], "combination": combination}
    typer.echo(f"{id} is served: {summary(found)}, loss {job['result']['loss']:.4f}")


def read_examples(path: Path) -> list[Any]:
    """The examples of a file. Ends the command where it cannot be read."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"examples: cannot read {path}: {error}")
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                examples.append(json.loads(line))
            except ValueError as error:
                fail(f"examples: line {number} of {path} is not JSON: {error}")
    return examples


def summary(record: Mapping[str, Any]) -> str:
    """One line on what a composition is: ``0.7 × a + 0.3 × b (lorahub)``."""
    terms = " + ".join(f"{member['weight']:.4g} × {member['id']}" for member in record["adapters"])
    return f"{terms} ({record['combination']})"


def _body(members: Sequence[str], combination: str, description: str | None) -> dict[str, Any]:
    """What a composition is to be."""
    body = {"adapters": [_member(text) for text in members], "combination": combination}
    return body if description is None else {**body, "description": description}


def _member(text: str) -> dict[str, Any]:
    id, _, weight = text.rpartition("=")
    if not id:
        fail(f"{text!r} is not ADAPTER=WEIGHT")
    try:
        return {"id": id, "weight": finite(text, float(weight))}
    except ValueError:
        fail(f"{text!r} is not ADAPTER=WEIGHT: {weight!r} is no number")


def _follow(server: Server, job: Mapping[str, Any], budget: int) -> Any:
    """The job once it has ended, with its progress shown until then."""
    path = f"/admin/jobs/{job['id']}"
    try:
        with _progress(budget) as advance:
            for event in server.events(f"{path}/events"):
                if event["type"] == "end":
                    return event["job"]
                advance(event["loss"])
    except KeyboardInterrupt:
        return server.request("DELETE", path)
    raise RemoteError(f"the events of {job['id']} broke off")


@contextmanager
def _progress(budget: int) -> Iterator[Callable[[float | None], None]]:
    """A bar on a terminal, a line for every trial elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, best = Console(stderr=True), float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task, number = bar.add_task("searching", total=budget), 0

        def advance(loss: float | None) -> None:
            nonlocal best, number
            number += 1
            best = min(best, float("inf") if loss is None else loss)
            bar.update(task, advance=1, description=f"searching, best loss {best:.4f}")
            if not console.is_terminal:
                shown = "not finite" if loss is None else f"{loss:.4f}"
                typer.echo(f"{number}/{budget}  loss {shown}  best {best:.4f}", err=True)

        yield advance


def _print_table(records: Sequence[Mapping[str, Any]]) -> None:
    columns = ("id", "base", "state", "composition", "description")
    print_table(
        columns,
        ((one["id"], one["base"] or "-", one["state"], summary(one), one["description"] or "-") for one in records),
    )
